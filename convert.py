"""The same model in another container or precision.

    python convert.py --to gguf --type q8_0 --model Qwen/Qwen3-0.6B      one .gguf file, identical to llama.cpp's
    python convert.py --to gguf --for qwen3.c                            the layout that the pure-C program qwen3.c maps
    python convert.py --to fp16                                          official safetensors layout in another type
    python convert.py --to int4                                          weight-only, as vLLM and transformers read it
    python convert.py --to safetensors --model model.gguf                back from GGUF
    python convert.py --verify OUT                                       check that nothing has changed

Tensors are read, checked, converted and written a piece at a time, so memory does not grow with the model. The result
takes its final name when it is whole, and model_context.json beside it says what it was made from (formats/record.py).
"""

import argparse
import math
import shlex
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import console
from formats.convert_options import parse_arguments

if __name__ == "__main__":
    console.answer_early(parse_arguments)  # --help and a wrong flag need no PyTorch

import torch

from formats import record
from formats.compressed_tensors import BITS, quantization_config
from formats.conversion import Checked, Source, check_disk, check_place, show_size, write_json
from formats.files import atomic_directory, atomic_file
from formats.gguf import writer
from formats.gguf.reader import GGUF
from formats.safetensors_write import SafetensorsWriter, Shard, plan_shards
from formats.threads import map_in_threads
from model import EMBEDDING, HEAD, refuse, skeleton
from ops.encode import Cast, Errors, Quantize, gguf_packer, lossless

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PENDING = 2  # pieces that may wait for the writing thread

# ---- the result ------------------------------------------------------------------------------------------------------


class Result:
    """What a conversion wrote, collected while it runs.

    `tensors`: stored name → place in a file, sha256 and errors. `files`: name → size and sha256. `kinds`: kind of
    tensor and how it is stored → errors, for the table.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.kinds: dict[tuple[str, str], Errors] = {}

    def add_kind(self, name: str, stored_as: str, errors: Errors) -> None:
        if known := self.kinds.get((kind_of(name), stored_as)):
            known.merge(errors)
        else:
            self.kinds[kind_of(name), stored_as] = errors

    def entry(self, source: Source, options: argparse.Namespace, hashes: record.HashThread, files: dict[str, Path]):
        """The entry of model_context.json. `files`: those written, by their final names."""
        self.files = record.HashThread(files).result()
        chosen = {"to": options.to, "type": options.type, "for": options.reader, "group_size": options.group_size}
        return record.sign(
            {
                **record.made_by(),
                "source": source.describe(hashes),
                **{key: value for key, value in chosen.items() if value is not None},
                "files": self.files,
                "tensors": self.tensors,
            }
        )

    def print(self) -> None:
        """The largest and the mean error of each kind of tensor, against the source's values."""
        print(f"{'tensors':<26}{'count':>7}  {'stored as':<10}{'largest error':>15}{'mean error':>13}{'relative':>11}")
        for (kind, stored_as), errors in self.kinds.items():
            line, numbers = f"{kind:<26}{errors.tensors:>7}  {stored_as:<10}", errors.to_dict()
            relative = f"{100 * numbers['relative_error']:.2g} %" if "relative_error" in numbers else "-"
            figures = f"{numbers['largest_error']:>15.3g}{numbers['mean_error']:>13.3g}{relative:>11}"
            print(line + (f"{'exact':>15}" if errors.exact else figures))

    def warn_of_overflow(self) -> None:
        counts = {name: tensor["overflowed"] for name, tensor in self.tensors.items() if tensor.get("overflowed")}
        if counts:
            worst = max(counts, key=counts.__getitem__)
            console.notice(
                f"warning: {sum(counts.values()):,} values in {len(counts):,} tensors are beyond float16's 65,504 and "
                f"became infinite (most in {worst}: {counts[worst]:,}); bfloat16 could hold them"
            )


def kind_of(name: str) -> str:
    """q_proj, input_layernorm, embed_tokens, …; the experts' projections and the biases separately."""
    module, _, leaf = name.rpartition(".")
    kind = ("experts." if ".experts." in module else "") + module.rpartition(".")[2]
    return kind if leaf == "weight" else f"{kind}.{leaf}"


# ---- to safetensors --------------------------------------------------------------------------------------------------


def convert_to_safetensors(source: Source, out: Path, options: argparse.Namespace) -> Result:
    """A directory in the official layout, in one dtype, as stored, or quantised."""
    if source.config.get("tie_word_embeddings"):  # the official 0.6B and 1.7B store the head all the same
        source.tensors.pop(HEAD, None)  # a GGUF holds what the source holds, as llama.cpp's does
    if options.to in BITS:
        target: Cast = Quantize(source.tensors, options.to, options.group_size)
    elif options.to in DTYPES:
        target = Cast(dict.fromkeys(source.tensors, DTYPES[options.to]))
    else:
        target = lossless(source.checkpoint)
    outputs = {output: i for name, info in source.tensors.items() for output, i in target.outputs(name, info).items()}
    shards = plan_shards(outputs, options.max_shard_size)
    check_disk(out, sum(shard.size for shard in shards))
    config = set_dtype(source.config, target.dtypes[EMBEDDING])
    if isinstance(target, Quantize):
        config["quantization_config"] = quantization_config(target.scheme)
    with atomic_directory(out) as directory:
        hashes = record.HashThread(source.files)
        result = write_safetensors(source, target, directory, shards)
        source.carry(directory)
        write_json(directory / "config.json", config)
        write_record(directory, result, source, options, hashes)
    return result


def set_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the dtype of the weights, under whichever key the file has (published files: torch_dtype)."""
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))


def write_safetensors(source: Source, target: Cast, directory: Path, shards: list[Shard]) -> Result:
    """Streams every tensor through `target` into the planned shards; several threads convert, one writes and hashes."""
    places = {name: place for shard in shards for name, place in shard.places.items()}
    result, pending = Result(), deque()
    with (
        console.byte_progress() as progress,
        SafetensorsWriter(directory, shards) as writer,
        ThreadPoolExecutor(1) as thread,
    ):
        task = progress.add_task("converting", total=sum(place.size for place in places.values()))

        def write(name: str, values: torch.Tensor) -> None:
            pending.append(thread.submit(writer.append, name, values))
            wait(PENDING)

        def wait(most: int) -> None:
            while len(pending) > most:
                progress.update(task, advance=pending.popleft().result())

        def encode(job: tuple[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor], Errors]:
            name, values = job
            stored, restored = target.encode(name, values)
            found = Errors(values.numel())
            if restored is not None:
                found.add(values, restored)
            return name, stored, found

        errors = {name: Errors(0) for name in source.tensors}
        jobs = ((name, values) for name in source.tensors for values in source.pieces(name))
        for name, stored, found in map_in_threads(encode, jobs):
            errors[name].merge(found)
            for output, values in stored.items():
                write(output, values)
        for name in places:
            if name.endswith(".weight_shape"):
                write(name, torch.tensor(source.tensors[name.removesuffix("_shape")].shape))
        wait(0)
    for name, place in places.items():
        where = {"file": place.file, "offset": place.offset, "bytes": place.size, "sha256": writer.sha256(name)}
        result.tensors[name] = where
    for name, info in source.tensors.items():
        errors[name].tensors = 1
        result.tensors[next(iter(target.outputs(name, info)))] |= errors[name].to_dict()
        result.add_kind(name, target.type_of(name), errors[name])
    return result


def write_record(directory: Path, result: Result, *about: Any) -> None:
    """model_context.json of a result that is a directory, written last."""
    entry = result.entry(*about, {file.name: file for file in sorted(directory.iterdir())})
    (directory / record.NAME).write_text(record.to_text({".": entry}), encoding="utf-8")


# ---- to GGUF ---------------------------------------------------------------------------------------------------------


def convert_to_gguf(source: Source, out: Path, options: argparse.Namespace) -> Result:
    """One .gguf file; for qwen3.c a directory with one and its three text files."""
    planned = writer.plan(source.checkpoint, options.type or "f32")
    check_disk(out, sum(tensor.size for tensor in planned) * (2 if options.reader else 1))  # it stores the head twice
    if options.reader:
        with atomic_directory(out) as directory:
            hashes = record.HashThread(source.files)
            path = directory / f"{source.name}.gguf"
            result = write_gguf(source, planned, path, path.name, options)
            write_record(directory, result, source, options, hashes)
        return result
    with atomic_file(out) as temporary:
        hashes = record.HashThread(source.files)
        result = write_gguf(source, planned, temporary, out.name, options)
        entry = result.entry(source, options, hashes, {out.name: temporary})
        record.write_entry(out, entry)  # first, so that a file under its final name always has its record
    return result


def write_gguf(source: Source, planned: list[Any], path: Path, name: str, options: argparse.Namespace) -> Result:
    """Writes the planned tensors to `path`, which will be renamed to `name`, and records each offset and digest."""
    result, found = Result(), {}
    with console.byte_progress() as progress:
        task = progress.add_task("converting", total=sum(tensor.size for tensor in planned))

        def on_tensor(_: str, size: int) -> None:
            progress.update(task, advance=size)

        if options.reader:
            writer.write_qwen3c(Checked(source), path, on_tensor)
        else:
            found = writer.write_gguf(Checked(source), path, options.type, on_tensor, gguf_packer(planned))
    written, origins = GGUF(path), {tensor.name: tensor.sources for tensor in planned}
    for tensor, (format, shape, start, size) in written.stored.items():
        official_names = origins.get(tensor, [HEAD])  # qwen3.c needs the head of a tied model too
        errors = Errors(math.prod(shape), *found.get(tensor, ()))
        if math.isinf(errors.largest):  # beyond float16: count these values separately from the errors of the rest
            errors = Errors(math.prod(shape))
            for origin in official_names:
                errors.add(source.checkpoint.read(origin), written.read(origin))
        digest = record.sha256_of_range(path, start, size)
        result.tensors[tensor] = {"file": name, "offset": start, "bytes": size, "sha256": digest, **errors.to_dict()}
        result.add_kind(official_names[0], format.name, errors)
    return result


# ---- the command -----------------------------------------------------------------------------------------------------


def output_path(options: argparse.Namespace, source: Source, is_directory: bool) -> Path:
    if options.out is None:
        suffix = "" if is_directory else ".gguf"
        return Path(f"{source.name}-{options.type or options.reader or options.to}{suffix}")
    if is_directory == (options.out.suffix == ".gguf"):
        form = "a directory, so its name must not end in .gguf" if is_directory else "one file whose name ends in .gguf"
        raise ValueError(f"--out {options.out}: the result of this conversion is {form}")
    return options.out


def verify(out: Path) -> None:
    with console.byte_progress() as progress:
        files = [file for file in out.iterdir() if file.is_file()] if out.is_dir() else [out]
        task = progress.add_task("verifying", total=sum(file.stat().st_size for file in files if file.exists()))
        entry = record.verify(out, lambda size: progress.update(task, advance=size))
    size = sum(file["bytes"] for file in entry["files"].values())
    files, tensors = count(entry["files"], "file"), count(entry["tensors"], "tensor")
    print(f"{out}: {files}, {tensors}, {show_size(size)}: every byte is as written")


def count(things: dict, name: str) -> str:
    return f"{len(things):,} {name}" + ("" if len(things) == 1 else "s")


def main() -> None:
    options = parse_arguments()
    if options.verify:
        verify(options.verify)
        return
    source = Source(options.model, options.adapter)
    refuse(source.checkpoint, skeleton(source.checkpoint)[1])
    is_directory = options.to != "gguf" or options.reader is not None
    out = output_path(options, source, is_directory)
    check_place(out, source, is_directory, options.force)
    convert = convert_to_gguf if options.to == "gguf" else convert_to_safetensors
    try:
        result = convert(source, out, options)
    except OSError as error:
        if error.filename is None or not Path(error.filename2 or error.filename).is_relative_to(out.parent):
            raise
        raise ValueError(f"--out {out}: {(error.strerror or str(error)).lower()}; choose another place") from None
    result.print()
    result.warn_of_overflow()
    size = sum(file["bytes"] for file in result.files.values())
    print(f"wrote {out}: {show_size(size)} in {count(result.files, 'file')}; --verify {out} checks it")
    if not options.reader:
        console.notice(f"try it: python generate.py --model {shlex.quote(str(out))}")


if __name__ == "__main__":
    console.run(main)
