"""This process among the others of a run, and the signals that end it."""

import os
import signal
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ops.devices import pick_device
from training.objectives import Objective
from training.run import Run


class Processes:
    """This process among those that torchrun started, or alone. https://pytorch.org/docs/stable/elastic/run.html"""

    def __init__(self, parallel: str, device: str):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.parallel = parallel
        if self.count > 1 and parallel == "none":
            raise ValueError(f"torchrun started {self.count} processes, but train.parallel is none; set ddp or fsdp")
        if parallel != "none" and "RANK" not in os.environ:
            raise ValueError(f"train.parallel is {parallel}: start with torchrun --nproc-per-node N train.py …")
        self.device = torch.device(pick_device(device, "train.device"))
        if self.device.type == "cuda" and self.count > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if parallel != "none":
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def spread(self, objective: Objective) -> nn.Module:
        """The objective with its model whole in every process (gradients are averaged), or cut over all of them."""
        if self.parallel == "ddp":
            return DistributedDataParallel(objective)
        if self.parallel == "fsdp":
            for block in objective.model.model.layers:
                fully_shard(block)
            fully_shard(objective)
        return objective

    def shared_at_once(self, objective: nn.Module, is_last: bool) -> AbstractContextManager:
        """DDP sends the gradients of a step's last batch alone, which are the sums over all of its batches."""
        return objective.no_sync() if self.parallel == "ddp" and not is_last else nullcontext()

    @contextmanager
    def together(self, run: Run):
        """What is done in step with the others: that one of them died is reported by the libraries in many ways."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1:
                raise
            raise ValueError(
                f"another process of this run ended ({error}); go on from {run.latest} with --resume"
            ) from None

    @property
    def share(self) -> slice:
        """What this process takes of a list that all of them see."""
        return slice(self.rank, None, self.count)

    def sum(self, value: float) -> float:
        """Of one number over all processes."""
        if self.count == 1:
            return value
        return float(self.sum_tensor(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def sum_tensor(self, values: Tensor) -> Tensor:
        if self.count > 1:
            distributed.all_reduce(values)
        return values


class Stop:
    """Ctrl-C and SIGTERM let the step under way finish, then the run is saved; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
