"""What `/metrics` tells Prometheus: how many wait and run, tokens, and the times that a client notices."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from serving.choice import News

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One server's numbers, under names that begin with nanoqwen_."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def make(kind, name, what, labels=(), **more):
            return kind(f"nanoqwen_{name}", what, labels, registry=registry, **more)

        self.requests = make(Counter, "requests", "Requests by endpoint and status", ("endpoint", "status"))
        self.queue = make(Gauge, "queue", "Replies that wait for their first token")
        self.batch = make(Gauge, "batch", "Replies that are running")
        self.cache = make(Gauge, "cache_bytes", "Memory of keys and values", ("of",))
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts, cached ones too")
        self.cached_tokens = make(Counter, "cached_tokens", "Tokens of prompts that came from a kept cache")
        self.tokens = make(Counter, "generated_tokens", "Tokens of replies")
        self.cancelled = make(Counter, "cancelled", "Replies whose client went away")
        first = "From request to first token"
        self.first = make(Histogram, "time_to_first_token_seconds", first, buckets=SECONDS)
        self.between = make(Histogram, "time_between_tokens_seconds", "From token to token", buckets=SECONDS)
        self.seconds = make(Histogram, "request_seconds", "From request to the end of the reply", buckets=SECONDS)

    def heard(self, news: News) -> None:
        """Tokens have come."""
        if not news.count:
            return
        choice = news.choice
        if choice.told is None:
            self.first.observe(news.at - choice.begun)
            self.prompt_tokens.inc(len(choice.reply.ids))
            self.cached_tokens.inc(choice.reply.cached)
        else:
            self.between.observe(news.at - choice.told)
        self.tokens.inc(news.count)

    def text(self) -> bytes:
        return generate_latest(self.registry)
