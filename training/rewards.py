"""What a reply is worth: a reward for a right answer and for its form."""

from collections.abc import Callable

from inference.replies import Reply


def reward(reply: Reply, is_right: Callable[[str], bool], format_reward: float) -> float:
    """1 for a right answer and `format_reward` for its form, as DeepSeek-R1 (https://arxiv.org/abs/2501.12948) adds
    accuracy and format. An answer that never ended is not right, whatever it has said so far."""
    return float(reply.well_formed and is_right(reply.answer)) + format_reward * reply.well_formed
