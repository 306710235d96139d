"""bench.py's measurements of transformers' own model, in a process of its own: the product never imports it."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from benchmarks.speed import QUESTION, Job, measure


class Transformers:
    """The loop of greedy decoding around the bare model: faster than its `generate`, so the fairer peer."""

    def __init__(self, job: Job):
        self.job = job
        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(job.model)
        self.prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)

    def load(self) -> None:
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[self.job.precision]
        self.model = AutoModelForCausalLM.from_pretrained(self.job.model, dtype=dtype).to(self.job.device).eval()

    def new_cache(self, rows: int, positions: int) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def next(self, ids: list[list[int]], cache: DynamicCache) -> list[list[int]]:
        ids = torch.tensor(ids, device=self.job.device)
        return self.model(ids, past_key_values=cache, logits_to_keep=1).logits.float().argmax(-1).tolist()

    def settle(self) -> None:
        """Nothing changes between its tokens."""

    def sizes(self) -> dict[str, int]:
        return {}  # it reads the same weights, which bench.py counts


if __name__ == "__main__":
    print(json.dumps(measure(Transformers, Job(**json.loads(sys.argv[2])))))
