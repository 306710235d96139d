"""The flags that commands which load a model and let it speak have in common. Needs no PyTorch."""

from argparse import ArgumentParser


def add_model_flags(parser: ArgumentParser) -> None:
    """Which model, where it is computed and how precisely: what `inference/load.py`'s `load_model` reads."""
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="SRC", help="directory, hub id or .gguf file (default: Qwen/Qwen3-0.6B)")
    add("--adapter", metavar="DIR", help="a PEFT adapter (LoRA) to merge into it: directory or hub id")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto, the fastest there is")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: auto, as stored")
    add("--quantize", choices=("int8", "int4"), help="quantize the weights while loading")
    add("--kv", choices=("auto", "int8"), default="auto", help="int8: keys and values in 8 bits, half the cache")
    add("--kernels", choices=("auto", "torch", "triton"), default="auto", help="on a GPU (default: auto)")
    add("--compile", action="store_true", help="torch.compile for the layers that PyTorch computes; try it on a GPU")


def add_sampling_flags(parser: ArgumentParser) -> None:
    """How tokens are chosen; `inference/params.py`'s `sampling_flags` reads them."""
    group = parser.add_argument_group("sampling", "Defaults are the checkpoint's own, else the model card's advice.")
    add = group.add_argument
    add("--temperature", type=float, metavar="X", help="divides the logits; 0 is greedy")
    add("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0 is off")
    add(
        "--top-p", type=float, metavar="P", help="only the likeliest tokens that reach probability P together; 1 is off"
    )
    add("--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the likeliest; 0 is off")
    add(
        "--presence-penalty",
        type=float,
        metavar="X",
        help="taken off the logit of tokens in the reply so far, -2 to 2 (default: 0)",
    )
    add(
        "--frequency-penalty", type=float, metavar="X", help="the same for each time that a token occurred (default: 0)"
    )
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="divides the logits of tokens in prompt and reply (default: 1)",
    )
    add("--seed", type=int, metavar="N", help="the same seed gives the same text (default: a new one each time)")
