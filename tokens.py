"""Text and token ids: the byte-level BPEs of GPT-2, Llama 3, Qwen, SmolLM and OLMo, read from their
files and written there. And files written whole. One need not read it to follow an algorithm.

    tokenizer = load_tokenizer("gpt2")       # or FILE.tiktoken, or a Hugging Face directory
    prompt_ids, response_ids = encode(tokenizer, "How do I fix a bike?", "You need tools.", 1024)
"""

import base64
import binascii
import hashlib
import json
import math
import os
import re
import shutil
import unicodedata
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import tiktoken


END_OF_TEXT = "<|endoftext|>"
# GPT-2's split into words: contractions, letters, digits, other signs, spaces; a word takes along
# the space before it.
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same of what is left when each digit stands alone: SmolLM2's.
DIGITS_SPLIT = r"""\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""


class Tokenizer(tiktoken.Encoding):
    """A byte-level BPE: `tiktoken.Encoding` with what a Hugging Face directory says besides.

    special {text: id}: templates alone insert them; a text that spells one is ordinary text. ends:
    the ids at which sampling stops; training appends the first, `eot_token`. bos: the id that texts
    begin with, or None. template: how prompts are laid out, one of TEMPLATES, or None. files {name:
    text}: what a run's directory holds of it; empty: `tokenizer_files` writes them.
    """

    def __init__(self, name, ranks, special, split=GPT2_SPLIT, ends=(), bos=None, nfc=False):
        single = [bytes([byte]) for byte in range(256)]
        missing = [byte for byte in single if byte not in ranks]  # tiktoken asks for all of them
        self.size = 1 + max([*ranks.values(), *special.values()])
        ranks = ranks | {byte: self.size + i for i, byte in enumerate(missing)}
        super().__init__(name, pat_str=split, mergeable_ranks=ranks, special_tokens=special)
        self.special, self.split, self.nfc, self.bos, self.files = special, split, nfc, bos, {}
        self.missing, self.ends = missing, tuple(ends) or (special[END_OF_TEXT],)
        self.template, self.system = None, ""

    @property
    def n_vocab(self):
        return self.size

    @property
    def eot_token(self):
        return self.ends[0]

    def encode_ordinary(self, text):
        """The ids of a text. Bytes that have no token are left out, as by Hugging Face's tokenizers
        (which merge across them too). A run of a million spaces would overflow tiktoken's stack:
        such runs are taken in pieces."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        most, cuts = 100_000, []
        for run in re.finditer(r"\s+", text) if len(text) > most else ():
            cuts += range(run.start() + most, run.end(), most)
        found = []
        for begin, end in pairwise([0, *cuts, len(text)]):
            found += super().encode_ordinary(text[begin:end])
        return [token for token in found if token < self.size] if self.missing else found

    def bytes_of(self, token):
        """A token's bytes; U+FFFD's for a number without a token, as a model whose vocabulary is
        padded to a round size can sample."""
        try:
            return self.decode_single_token_bytes(token if token < self.size else -1)
        except (KeyError, OverflowError):
            return "\ufffd".encode()


# What a tokenizer's files that are not as they should be raise somewhere.
DAMAGE = ValueError, AttributeError, TypeError, LookupError, StopIteration, OverflowError


def load_tokenizer(name, template=None):
    """The `Tokenizer` of "gpt2"; of a FILE.tiktoken (one "base64 rank" a line); or of a directory
    with a byte-level BPE's Hugging Face files (tokenizer.json; vocab.json), such as a run, laying
    out prompts as `lay_out` says (None: as the run does).

    Raises:
        ValueError or OSError, in one line: there is none, it is damaged, or asks for what would be
        ignored here.
    """
    path = Path(name)
    if path.is_dir():
        try:
            return directory_tokenizer(path, template)
        except DAMAGE as error:
            if f"{path}" in f"{error}":  # ours, which says more
                raise
            raise ValueError(f"{path}: its tokenizer's files are damaged: {error!r}") from None
    if path.suffix == ".tiktoken":
        return lay_out(tiktoken_file(path), template)
    if str(name) != "gpt2":
        raise ValueError(
            f"tokenizer {name}: expected gpt2, a .tiktoken file or a directory that holds one"
        )
    try:
        found = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises: no network, a refusal, a bad hash
        raise ValueError(
            "tokenizer gpt2: its vocabulary is not cached and could not be downloaded "
            f"({type(error).__name__}). Set TIKTOKEN_CACHE_DIR to a folder where tiktoken has "
            'cached it (once, with a network: TIKTOKEN_CACHE_DIR=DIR python -c "import tiktoken; '
            "tiktoken.get_encoding('gpt2')\"), or give a GPT-2 directory that has a tokenizer.json "
            "or a vocab.json"
        ) from None
    ranks = {found.decode_single_token_bytes(rank): rank for rank in range(found.eot_token)}
    return lay_out(Tokenizer("gpt2", ranks, {END_OF_TEXT: found.eot_token}), template)


def tiktoken_file(path):
    """Of a file of ranks alone: <|endoftext|> takes the next number."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}:{number}: expected a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: its {len(ranks)} tokens are not numbered 0 to {len(ranks) - 1}")
    tokenizer = Tokenizer(str(path), ranks, {END_OF_TEXT: len(ranks)})
    if tokenizer.missing:
        raise ValueError(f"{path}: no token for byte {tokenizer.missing[0][0]}")
    return tokenizer


def byte_alphabet():
    """GPT-2's printable stand-in for each byte, {byte: character}: Hugging Face's files write
    tokens so. Printable Latin-1 stands for itself; the others are numbered from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + i) for i, byte in enumerate(others)}


TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def directory_tokenizer(directory, template=None):
    files = {
        name: (directory / name).read_text("utf-8")
        for name in TOKENIZER_FILES
        if (directory / name).is_file()
    }
    beside = {n: read_json(directory / n) for n in files if n.endswith(".json")}
    path = directory / ("tokenizer.json" if "tokenizer.json" in files else "vocab.json")
    if path.name not in files:
        raise ValueError(f"{directory}: no tokenizer here (tokenizer.json or vocab.json)")
    whole = beside.get("tokenizer.json", {})
    model = whole.get("model", {}) if whole else {"vocab": beside["vocab.json"]}
    if not whole and "merges.txt" in files:
        lines = files["merges.txt"].splitlines()
        model["merges"] = [line for line in lines if line and not line.startswith("#version")]
    settings = beside.get("special_tokens_map.json", {}) | beside.get("tokenizer_config.json", {})
    split, bos = components(path, whole | {"model": model}, settings)

    # Tokens that were added are special: no text has them.
    special = {one["content"]: one["id"] for one in whole.get("added_tokens") or ()}
    special |= beside.get("added_tokens.json", {})
    for number, one in (settings.get("added_tokens_decoder") or {}).items():
        special.setdefault(one["content"], int(number))
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(rank) is int for rank in vocab.values()):
        raise ValueError(f"{path}: vocab: expected an object of token: number")
    if END_OF_TEXT in vocab:
        special.setdefault(END_OF_TEXT, vocab[END_OF_TEXT])
    words = {token: rank for token, rank in vocab.items() if token not in special}
    if model.get("merges") is not None:  # a token's number stands for the order of merges here
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        made = [vocab.get("".join(pair), -1) for pair in pairs]
        longer = {rank for token, rank in words.items() if len(token) > 1}
        if made != sorted(made) or set(made) != longer:
            raise ValueError(f"{path}: tokens are not numbered in the order of their merges")
    to_byte = {character: byte for byte, character in byte_alphabet().items()}
    ranks = {}
    for token, rank in words.items():
        if not all(character in to_byte for character in token):
            raise ValueError(f"{path}: {token!r} is not a token of a byte-level BPE, as GPT-2's")
        ranks[bytes(to_byte[character] for character in token)] = rank
    numbers = [*ranks.values(), *special.values()]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{path}: two of its tokens have one number")

    # What ends a response: by name, and by the numbers that generation stops at. A number that no
    # token has was left by another vocabulary's configuration.
    named = content(settings.get("eos_token"))
    if named is not None and named not in special:
        raise ValueError(f"{directory}: eos_token: {named!r} is no token of its vocabulary")
    ends = [special.get(named)]
    config = directory / "config.json"
    for fields in (beside.get("generation_config.json"), config.exists() and read_json(config)):
        numbers = (fields or {}).get("eos_token_id")
        ends += numbers if isinstance(numbers, list) else [numbers]
    ends = [end for end in dict.fromkeys(ends) if end in special.values()]
    if not ends and END_OF_TEXT not in special:
        raise ValueError(f"{directory}: eos_token: no token that ends a response is named")
    nfc = (whole.get("normalizer") or {}).get("type") == "NFC"
    tokenizer = Tokenizer(str(path), ranks, special, split, ends, special.get(bos), nfc)
    tokenizer.files = files
    return lay_out(
        tokenizer, template or kept_template(read_json(config) if config.exists() else {})
    )


def content(token):
    """A token's text, which may stand in an object."""
    return token.get("content") if isinstance(token, dict) else token


def components(path, whole, settings):
    """-> the pattern that splits text, and the token that texts begin with, or None; ValueError,
    naming it, where a part of a tokenizer's files would be ignored."""

    def unknown(name, kinds="a byte-level BPE's of GPT-2, Llama 3, Qwen, SmolLM or OLMo"):
        raise ValueError(f"{path}: {name}: not {kinds}, which alone are known here")

    model, words = whole["model"], whole.get("pre_tokenizer") or {"type": "ByteLevel"}
    steps = words["pretokenizers"] if words["type"] == "Sequence" else [words]
    if model.get("type", "BPE") != "BPE" or steps[-1]["type"] != "ByteLevel":
        unknown("model" if model.get("type", "BPE") != "BPE" else "pre_tokenizer")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            unknown(f"model.{name}")
    if (whole.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        unknown("normalizer")
    if steps[-1].get("add_prefix_space") or settings.get("add_prefix_space"):
        unknown("add_prefix_space")
    first = [(step["type"], step.get("behavior"), step.get("invert", False)) for step in steps[:-1]]
    by_words = steps[-1].get("use_regex", True)
    if not first and by_words:
        split = GPT2_SPLIT
    elif first == [("Digits", None, False)] and steps[0]["individual_digits"] and by_words:
        split = DIGITS_SPLIT
    elif (
        first == [("Split", "Isolated", False)] and "Regex" in steps[0]["pattern"] and not by_words
    ):
        split = steps[0]["pattern"]["Regex"]
    else:
        unknown("pre_tokenizer")
    after = whole.get("post_processor") or {"type": "ByteLevel"}
    bos = []
    for step in after["processors"] if after["type"] == "Sequence" else [after]:
        if step["type"] == "TemplateProcessing":
            names = [next(iter(one.items())) for one in step.get("single") or ()]
            bos += [one["id"] for kind, one in names if kind == "SpecialToken"]
            if bos and (len(bos) > 1 or names[0][0] != "SpecialToken"):
                unknown("post_processor")
        elif step["type"] != "ByteLevel":
            unknown("post_processor")
    if settings.get("add_bos_token") and not bos:
        unknown("add_bos_token")
    return split, (bos or [None])[0]


def text_of(tokenizer, ids):
    """The text of token ids, whatever a model sampled."""
    return b"".join(tokenizer.bytes_of(token) for token in ids).decode("utf-8", "replace")


def response_of(tokenizer, ids):
    """-> the text of sampled ids without what ends it, and whether it has ended."""
    ended = ids[-1] in tokenizer.ends
    return text_of(tokenizer, ids[:-1] if ended else ids), ended


def check_tokenizer(tokenizer, directory, config):
    """ValueError unless the model in `directory`, with that config.json, can use the tokenizer."""
    known, found = config.get("tokenizer"), tokenizer_hash(tokenizer)
    if known not in (None, found):
        raise ValueError(
            f"{directory}: was trained with the tokenizer {known}, not with {tokenizer.name}, "
            f"which is {found}"
        )
    embeddings = config.get("vocab_size", 50257)  # GPT-2's
    if embeddings < tokenizer.n_vocab:
        raise ValueError(
            f"{directory}: has {embeddings} embeddings, the tokenizer {tokenizer.name} "
            f"{tokenizer.n_vocab} tokens"
        )


def identity(tokenizer):
    """What the ids of a prompt and its response depend on, besides their text."""
    how = (tokenizer.template, tokenizer.system, tokenizer.bos, tokenizer.eot_token)
    return [tokenizer_hash(tokenizer), *how]


def tokenizer_hash(tokenizer):
    """Twelve hex digits that two tokenizers share just when they number the same tokens alike, and
    split text alike."""
    digest = hashlib.sha256()
    for rank in range(tokenizer.n_vocab):
        token = tokenizer.bytes_of(rank)
        digest.update(len(token).to_bytes(4, "big") + token)
    if tokenizer.split != GPT2_SPLIT or tokenizer.nfc:
        digest.update(f"{tokenizer.split} {tokenizer.nfc}".encode())
    return digest.hexdigest()[:12]


def tokenizer_files(tokenizer):
    """{file name: text}, so that `transformers.AutoTokenizer` opens the directory: the files that
    the tokenizer is from, or, where it is from none of theirs, as GPT-2's."""
    if tokenizer.files:
        return with_template(tokenizer)
    ranks = {
        tokenizer.decode_single_token_bytes(rank): rank
        for rank in range(tokenizer.n_vocab)
        if rank != tokenizer.eot_token
    }
    alphabet = byte_alphabet()

    def written(token):
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        # Merging with lower ranks only must leave two parts: the merge that made this token.
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = pairs.index(min(pairs))
            if pairs[first] >= rank:
                raise ValueError(f"token {token!r} can't be reached by merging two others")
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append([written(parts[0]), written(parts[1])])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {"id": tokenizer.eot_token, "content": END_OF_TEXT, "special": True}
    special |= dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    tokenizer_json = {
        "version": "1.0",
        "added_tokens": [special],
        "pre_tokenizer": byte_level | {"use_regex": True},
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {written(t): r for t, r in ranks.items()} | {END_OF_TEXT: tokenizer.eot_token},
            "merges": merges,
        },
    }
    tokenizer_config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    tokenizer_config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config}
    return {name: json_text(contents) for name, contents in files.items()}


def with_template(tokenizer):
    """A tokenizer's files, whose chat template and end of a turn are those that it has here."""
    files, (_, end, jinja) = dict(tokenizer.files), TEMPLATES.get(tokenizer.template, (0, None, ""))
    settings = json.loads(files.get("tokenizer_config.json", "{}"))
    if end is None:
        files.pop("chat_template.jinja", None)
        changed = {name: x for name, x in settings.items() if name != "chat_template"}
    else:
        changed = settings | {"eos_token": end}
        if end not in own_template(files):  # another's, or none
            files.pop("chat_template.jinja", None)
            changed |= {"chat_template": jinja}
    if changed != settings:
        files["tokenizer_config.json"] = json_text(changed)
    stops = json.loads(files.get("generation_config.json", "{}"))
    if end is not None and stops and stops.get("eos_token_id") != list(tokenizer.ends):
        files["generation_config.json"] = json_text(stops | {"eos_token_id": list(tokenizer.ends)})
    return files


class Conversation(str):
    """A prompt of several turns: reads as text, one turn after the other; `messages` are dicts of
    `role` (system, user, assistant) and `content`. ValueError where they are none."""

    def __new__(cls, messages):
        for message in messages:
            good = isinstance(message, dict) and isinstance(message.get("content"), str)
            if not good or message.get("role") not in ("system", "user", "assistant"):
                raise ValueError("expected messages of role (system, user, assistant) and content")
            message["content"].encode("utf-8")  # a lone surrogate is valid JSON, but no text
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise ValueError("expected messages of which the last is the user's, and not empty")
        made = super().__new__(cls, "\n\n".join(f"{m['role']}: {m['content']}" for m in messages))
        made.messages = messages
        return made

    def __eq__(self, other):  # not as texts: one message may spell the next one's beginning
        return isinstance(other, Conversation) and self.messages == other.messages

    def __ne__(self, other):
        return not self == other

    __hash__ = str.__hash__


def chatml(messages, system):
    """Turns as Qwen and SmolLM2 read them, [(special token, text after it)]; `system` is what the
    system says where it says nothing."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    for message in messages:
        yield "<|im_start|>", f"{message['role']}\n{message['content']}"
        yield "<|im_end|>", "\n"
    yield "<|im_start|>", "assistant\n"


def llama3(messages, system):
    """Turns as Llama 3 reads them; `system` is what every conversation's system says first."""
    yield "<|begin_of_text|>", ""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    for i, message in enumerate([*messages, {"role": "assistant", "content": ""}]):
        before = system if i == 0 else ""
        yield "<|start_header_id|>", message["role"]
        yield "<|end_header_id|>", "\n\n" + before + message["content"].strip()
        yield "<|eot_id|>", ""


# Of each: its function, the token that ends a turn, and Jinja for other tools that has no words of
# a system of its own.
TEMPLATES = {
    "chatml": (
        chatml,
        "<|im_end|>",
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "llama3": (
        llama3,
        "<|eot_id|>",
        "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
}
TODAY = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # Llama 3.1's default


def kept_template(fields):
    """The template that a run's config.json names; None where it is no run's."""
    return (fields["template"] or "none") if "template" in fields else None


def lay_out(tokenizer, template=None):
    """Sets how the tokenizer lays prompts out, and gives it back: by one of TEMPLATES, or "none";
    None: by the one whose special tokens it has, and its files' chat template, if there is one."""
    own = own_template(tokenizer.files)
    fitting = [name for name, (_, end, _) in TEMPLATES.items() if end in tokenizer.special]
    if template not in (None, "none", *fitting):
        raise ValueError(f"--template {template}: {tokenizer.name} has not its special tokens")
    if template is None and own and not any(TEMPLATES[name][1] in own for name in fitting):
        raise ValueError(
            f"{tokenizer.name}: chat_template: is neither ChatML's nor Llama 3's; sft.py "
            "--template none makes a run that reads prompts as plain text"
        )
    template = next(iter(fitting), "none") if template is None else template
    if template == "none":
        return tokenizer
    tokenizer.template, end = template, tokenizer.special[TEMPLATES[template][1]]
    tokenizer.ends = tuple(dict.fromkeys((end, *tokenizer.ends)))
    # The words of a system that a model's own template puts before every conversation.
    if template == "chatml":
        words = r"<\|im_start\|>system(?:\\n|\n)((?:[^'{}\\]|\\.)+?)<\|im_end\|>"
        words = (re.search(words, own) or ["", ""])[1].replace("\\n", "\n")
        tokenizer.system = re.sub(r"\\(.)", r"\1", words)
    elif "Cutting Knowledge Date" in own:
        tokenizer.system = TODAY
    return tokenizer


def own_template(files):
    """The chat template, in Jinja, of a tokenizer's files; empty where there is none."""
    found = files.get("chat_template.jinja")
    if found is None and "tokenizer_config.json" in files:
        found = json.loads(files["tokenizer_config.json"]).get("chat_template")
    if isinstance(found, list):  # of several, by name
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found if isinstance(found, str) else ""


def ids_of_text(tokenizer, text):
    """Of a text as it is: what stands at every text's beginning, and it; one EOS where it is empty,
    since column 0 can't be predicted."""
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    return [*begin, *tokenizer.encode_ordinary(text)] or [tokenizer.eot_token]


def ids_of_prompt(tokenizer, prompt):
    if tokenizer.template is None or not prompt:
        return ids_of_text(tokenizer, prompt)
    messages = getattr(prompt, "messages", [{"role": "user", "content": prompt}])
    found, (turns, end, _) = [], TEMPLATES[tokenizer.template]
    for special, text in turns(messages, tokenizer.system):
        found += [tokenizer.special[special], *tokenizer.encode_ordinary(text)]
    return found[:-1] if special == end else found  # the assistant's turn is open


def encode(tokenizer, prompt, response, max_length, cut_response=False):
    """Token ids of a prompt and of its response with EOS, two lists, at most max_length together.

    A prompt is a text or a `Conversation`; the tokenizer's template says how it is laid out. The
    two are encoded apart: a merge across the border would change the prompt's tokens. `response`
    None is a prompt alone: the second list is empty. Too long, the prompt loses its start (its end
    is what is answered), down to one token; if that is not enough, the response loses its end, EOS
    included, when `cut_response`.

    Raises:
        ValueError: the response alone is too long, and `cut_response` is False.
    """
    prompt_ids = ids_of_prompt(tokenizer, prompt)
    response_ids = []
    if response is not None:
        response_ids = [*tokenizer.encode_ordinary(response), tokenizer.eot_token]
    if len(response_ids) > max_length - 1:
        if not cut_response:
            raise ValueError(
                f"a response of {len(response_ids)} tokens leaves no room in {max_length}"
            )
        response_ids = response_ids[: max_length - 1]
    return prompt_ids[-(max_length - len(response_ids)) :], response_ids


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def whole_file(path):
    """Gives a temporary name to write to, then makes it `path` at once: a reader, or a machine that
    dies half-way, sees the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; safetensors' files are their owner's
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"{path}: could not be written: {error}") from error
        raise


def check_space(path, tensors):
    """OSError, in one line, unless the disk that `path` is to be on has room for the tensors."""
    size = sum(x.numel() * x.element_size() for x in tensors)
    free = shutil.disk_usage(Path(path).parent).free
    if size > free:
        raise OSError(
            f"{path}: not written: {size / 2**30:.3f} GiB do not fit into the {free / 2**30:.3f} "
            f"GiB that are free"
        )


def plain(contents, finite=False, marked=False):
    """JSON values with the messages of each Conversation in its place, `marked` as {MESSAGES:
    messages}; `finite`: and null for what is no finite number, as JSON has no NaN."""
    if isinstance(contents, dict):
        return {name: plain(x, finite, marked) for name, x in contents.items()}
    if isinstance(contents, list | tuple):
        return [plain(x, finite, marked) for x in contents]
    if finite and isinstance(contents, float) and not math.isfinite(contents):
        return None
    if isinstance(contents, Conversation):
        return {MESSAGES: contents.messages} if marked else contents.messages
    return contents


MESSAGES = "messages of a conversation"


def json_text(contents):
    return json.dumps(plain(contents, finite=True), indent=2, ensure_ascii=False) + "\n"


def write_json(path, contents):
    with whole_file(path) as temporary:
        temporary.write_text(json_text(contents), "utf-8")


def read_json(path):
    """The object in a JSON file; ValueError in one line if there is none."""
    try:
        contents = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(contents).__name__}")
    return contents
