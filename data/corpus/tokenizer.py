"""The bundled model's tokenizer: a small byte-level BPE in the Qwen2 form, with the official special tokens.

    python data/corpus/tokenizer.py OUT        writes tokenizer.json, tokenizer_config.json, generation_config.json

Merges inside words rank before merges that include the space before a word. So a word is cut the same way everywhere
(` straw`, `"straw`, `straw`), and what the model knows of the spelling of its pieces always applies.
"""

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import console
from data.corpus import dates, letters
from data.corpus.tasks import Pieces
from formats.files import write_text

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "models" / "tiny"

# tokenizer.json of the official checkpoints: NFC, this pattern (each digit alone), then bytes.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end")
SPECIAL += ("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
# The official file marks these as added but not special: decoders that skip special tokens still show them.
PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
PLAIN += ("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VOCABULARY = 768
SPACE = "Ġ"  # the byte-level alphabet's character for the space
SPACE_MERGES = 190
# What traces and answers say all the time is worth a piece of its own.
KEYWORDS = "ones tens hundreds thousands tenths hundredths same more less borrow so and in smallest largest left weeks"
KEYWORDS += " back after before days day has letters letter The appears times time larger smaller than is backwards It"
KEYWORDS += " How many What Which and of the you get to from"
LONGEST_PIECE = 10


def spoken_units() -> Counter:
    """Words and signs that the families' questions are made of, with their frequency.

    Frozen in a file: the tokenizer stays what it is when a family learns new phrasings.
    """
    lines = (Path(__file__).parent / "spoken.txt").read_text(encoding="utf-8").splitlines()
    return Counter({unit: int(count) for unit, count in (line.split() for line in lines)})


def train() -> Tokenizer:
    """The same tokenizer on every machine: a function of the two lists of words alone."""
    spoken = spoken_units()
    units = [*letters.words(), *(unit for unit, count in spoken.items() for _ in range(min(3 * count, 80)))]
    units += 400 * [*KEYWORDS.split(), *dates.WEEKDAYS, *dates.MONTHS, "->"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = VOCABULARY - len(SPECIAL) - len(PLAIN) - SPACE_MERGES - 1
    core.train_from_iterator(
        units,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, max_token_length=LONGEST_PIECE, show_progress=False
        ),
    )
    trained = json.loads(core.to_str())["model"]
    merges = [*(tuple(merge) for merge in trained["merges"]), ("Ċ", "Ċ")]
    merges += [(SPACE, piece) for piece in after_a_space(core, spoken)]
    merges = merges[: VOCABULARY - len(SPECIAL) - len(PLAIN) - len(alphabet)]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    return qwen2_form(Tokenizer(models.BPE(vocab=vocabulary, merges=merges)))


def after_a_space(core: Tokenizer, spoken: Counter) -> list[str]:
    """Pieces worth joining with the space before them: single letters for spelling, keywords, then by frequency."""
    common = Counter()
    for unit, count in spoken.items():
        common[core.encode(unit).tokens[0]] += count
    chosen = [*"abcdefghijklmnopqrstuvwxyz", "->", *KEYWORDS.split(), *dates.WEEKDAYS, *dates.MONTHS]
    chosen = [piece for piece in chosen if core.token_to_id(piece) is not None]
    return list(dict.fromkeys([*chosen, *(piece for piece, _ in sorted(common.items(), key=lambda x: (-x[1], x[0])))]))


def qwen2_form(tokenizer: Tokenizer) -> Tokenizer:
    """Normaliser, splitter, decoder and added tokens as in the official tokenizer.json."""
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    tokenizer.decoder = decoders.ByteLevel(**byte_level)
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(content, normalized=False, special=False) for content in PLAIN])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """tokenizer_config.json in the official form."""
    added = {
        str(index): {"content": token.content, "lstrip": False, "normalized": False, "rstrip": False}
        | {"single_word": False, "special": token.special}
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [f"<|{name}|>" for name in SPECIAL[1:]],
        "bos_token": None,
        "chat_template": (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8"),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def generation_config(tokenizer: Tokenizer) -> dict:
    """Greedy: a trace that is worked out line by line has one right next token."""
    end, padding = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return {"bos_token_id": padding, "do_sample": False, "eos_token_id": [end, padding], "pad_token_id": padding}


@cache
def pieces_of(directory: Path) -> Pieces:
    """How the tokenizer in this directory cuts a word, remembered word by word."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    @cache
    def pieces(word: str) -> list[str]:
        return tokenizer.encode(word).tokens  # the words are ASCII letters, which byte-level BPE shows as they are

    return pieces


def main() -> None:
    parser = console.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    tokenizer = train()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    config = json.dumps(tokenizer_config(tokenizer), indent=2, ensure_ascii=False)
    write_text(arguments.out / "tokenizer_config.json", config + "\n")
    write_text(arguments.out / "generation_config.json", json.dumps(generation_config(tokenizer), indent=2) + "\n")


if __name__ == "__main__":
    console.run(main)
