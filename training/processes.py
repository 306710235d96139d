"""The processes of a run, the error messages when one of them fails, and the signals that stop a run."""

import os
import signal
import socket
import threading
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import console
from ops.devices import pick_device
from training.objectives import Objective
from training.schema import Settings

PATIENCE = timedelta(hours=1)  # how long the others wait while one process writes a checkpoint


class Processes:
    """This process and the others that torchrun started, or one alone. https://pytorch.org/docs/stable/elastic/run.html"""

    def __init__(self, parallel: str, device: str):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.parallel, self.is_first = parallel, self.rank == 0
        if self.count > 1 and parallel == "none":
            raise ValueError(f"torchrun started {self.count} processes, but train.parallel is none; set ddp or fsdp")
        if parallel != "none" and "RANK" not in os.environ:
            raise ValueError(f"train.parallel is {parallel}: start with torchrun --nproc-per-node N train.py …")
        self.device = torch.device(pick_device(device, "train.device"))
        if self.device.type == "cuda" and self.count > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if parallel != "none":
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=PATIENCE)

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective for DDP (the whole model in every process, gradients averaged) or FSDP (sharded)."""
        if self.parallel == "ddp":
            return DistributedDataParallel(objective, forward_sync_buffers=False)  # they are constants
        if self.parallel == "fsdp":
            for block in objective.model.model.layers:
                fully_shard(block)
            fully_shard(objective)
            register_fsdp_forward_method(objective, "hidden_states")
        return objective

    def sync(self, objective: nn.Module, is_last: bool) -> AbstractContextManager:
        """DDP averages the gradients once a step, in the backward pass of the last micro-batch."""
        return objective.no_sync() if self.parallel == "ddp" and not is_last else nullcontext()

    @property
    def share(self) -> slice:
        """This process's items of a list that all processes have."""
        return slice(self.rank, None, self.count)

    def sum(self, value: float) -> float:
        """One number, summed over all processes."""
        return self.sums(value)[0]

    def sums(self, *values: float) -> list[float]:
        """Several numbers in one exchange."""
        if self.count == 1:
            return list(values)
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until every process has come here."""
        if self.count > 1:
            distributed.barrier()

    def close(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()


# --- failures ---


@contextmanager
def one_line_failures(settings: Settings, processes: Processes, latest: Path, loading: bool = False):
    """Out of memory, and the end of another process, as a ValueError that says what to do. Other errors pass.

    `loading`: nothing is computed yet, so smaller micro-batches would not help.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = str(error).partition("\n")[0]
        if console.is_out_of_memory(error):
            advice = LOADING_ADVICE if loading else f"{memory_advice(settings, processes.count)}, then --resume"
            raise ValueError(f"out of memory on {processes.device} ({message}); {advice}") from None
        if processes.count > 1 and is_lost_peer(error):
            again = f"continue from {latest} with --resume" if latest.exists() else "start again with --resume"
            raise ValueError(f"another process of this run ended, see its own message ({message}); {again}") from None
        raise


def is_lost_peer(error: BaseException) -> bool:
    """NCCL and the store have error classes; gloo raises a RuntimeError that begins with its source file."""
    return isinstance(error, distributed.DistError) or "/gloo/" in str(error)


LOADING_ADVICE = "the weights and the optimizer don't fit; take a smaller model or adapters (lora.rank) in a new run"


def memory_advice(settings: Settings, processes: int) -> str:
    train = settings.train
    more = 2 * train.accumulate
    if more <= max(train.batch, processes):
        return f"cut a step into smaller micro-batches with train.accumulate={more} (now {train.accumulate})"
    if not train.checkpoint_activations:
        return "set train.checkpoint_activations=true"
    return "shorten train.sequence in a new run, or train adapters (lora.rank)"


# --- signals ---


class Stop:
    """Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) let the current step finish, then the run is saved; Ctrl-C
    after that ends it at once. Under nohup SIGHUP stays ignored.

    Python calls a signal handler only between two of its own operations, and one backward pass may take long. The
    acknowledgement therefore comes from a thread, which the interpreter wakes at once (signal.set_wakeup_fd).
    """

    def __init__(self, processes: Processes):
        self.signal, self.step = 0, 0
        self.processes = processes

    def __enter__(self) -> "Stop":
        signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
            signals.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._caught) for number in signals}
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._acknowledge, name="signals", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        signal.set_wakeup_fd(self.wakeup)
        self.writer.close()  # ends the thread
        self.thread.join()
        self.reader.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether any process was told to stop; every process must call this."""
        return self.processes.sum(self.signal) > 0

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def _acknowledge(self) -> None:
        said = False
        while received := self.reader.recv(1):
            if received[0] in self.before and not said and self.processes.is_first:
                said, again = True, " again" if received[0] == signal.SIGINT else ""
                now = f"; Ctrl-C{again} ends now" if self.processes.count == 1 else ""
                console.notice(f"{signal.Signals(received[0]).name}: finishing step {self.step}, then saving{now}")
