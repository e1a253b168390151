"""tokens.py: each tokenizer exactly, or refused by name; conversations; files written whole."""

import base64
import json
import re

import pytest
from ranks import on_ranks

from model import save_model
from tokens import (
    END_OF_TEXT, TEMPLATES, Conversation, Tokenizer, check_tokenizer, encode, identity, lay_out,
    load_tokenizer, read_json, text_of, tokenizer_hash, whole_file, with_template, write_json,
)  # fmt: skip

# --- text to tokens -------------------------------------------------------------------------------


def test_encode_appends_eos_and_joins_nothing(tokenizer):
    eos = tokenizer.eot_token
    prompt, response = encode(tokenizer, "I play go", "lf with my cousin.", 64)
    assert prompt == tokenizer.encode_ordinary("I play go")
    assert response == [*tokenizer.encode_ordinary("lf with my cousin."), eos]
    assert encode(tokenizer, "", "My car.", 64)[0] == [eos]
    assert encode(tokenizer, "My car.", None, 64)[1] == []
    # The text of the special token is text, not the token.
    assert eos not in encode(tokenizer, END_OF_TEXT, None, 64)[0]


def test_encode_cuts_the_prompt_first(tokenizer):
    whole_prompt, whole = encode(tokenizer, "My car. My boat. My tent.", " I feel sad.", 64)
    prompt, response = encode(tokenizer, "My car. My boat. My tent.", " I feel sad.", 8)
    assert response == whole and prompt == whole_prompt[-3:]
    with pytest.raises(ValueError, match="5 tokens leaves no room in 5"):
        encode(tokenizer, "My car.", " I feel sad.", 5)
    prompt, response = encode(tokenizer, "My car.", " I feel sad.", 5, cut_response=True)
    assert response == whole[:4] and len(prompt) == 1 and tokenizer.eot_token not in response


def test_the_hash_tells_where_tokens_end():
    """Two vocabularies whose last two tokens, written one a line, would be the same text."""
    single = {bytes([byte]): byte for byte in range(256)}
    ranks = [single | {b"aa\n": 256, b"bb": 257}, single | {b"aa": 256, b"\nbb": 257}]
    assert len({tokenizer_hash(Tokenizer("x", r, {END_OF_TEXT: 258})) for r in ranks}) == 2


def test_a_model_with_fewer_embeddings_than_the_tokenizer_has_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"has 1023 embeddings, the tokenizer .* 1024 tokens"):
        check_tokenizer(tokenizer, "run", {"vocab_size": 1023})
    check_tokenizer(tokenizer, "run", {"vocab_size": 1030, "tokenizer": tokenizer_hash(tokenizer)})
    check_tokenizer(tokenizer, "run", {})


def test_text_of_ids_that_a_padded_vocabulary_has(tokenizer):
    ids = [*tokenizer.encode_ordinary("My car"), 1030, *tokenizer.encode_ordinary(".")]
    assert text_of(tokenizer, ids) == "My car\ufffd."


def test_tokenizer_survives_a_run_directory(tokenizer, tmp_path, small_gpt, toy_data):
    save_model(tmp_path / "run", small_gpt(vocab_size=1024), tokenizer)
    again = load_tokenizer(tmp_path / "run")
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    texts = ["My cousin sold my lamp. TL;DR:", " naïve café 3.14 \n\n  x", "日本 😀", "", "don't"]
    for text in texts:
        assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)
        assert again.decode(again.encode_ordinary(text)) == text
    contents = read_json(tmp_path / "run/tokenizer.json")["model"]
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old/vocab.json", contents["vocab"])
    assert tokenizer_hash(load_tokenizer(tmp_path / "old")) == tokenizer_hash(tokenizer)


def test_bad_tokenizers(tmp_path, monkeypatch):
    bad = tmp_path / "bad.tiktoken"
    whole = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    for lines, message in [
        (["IQ== 0", "!!! 1"], r"bad.tiktoken:2: expected a token in base64 and its rank"),
        (["IQ== 0", "IQ=="], r"bad.tiktoken:2: expected"),
        (["IQ== 5"], r"its 1 tokens are not numbered 0 to 0"),
        (["IQ== 0"], r"no token for byte 0"),
        ([*whole[:-1], "IQ== 255"], r"are not numbered 0 to 254"),
    ]:
        bad.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(bad)
    with pytest.raises(ValueError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="expected gpt2"):
        load_tokenizer("gpt3")
    for contents, message in [
        ("[1]", "expected a JSON object, got list"),
        ("{", "not JSON"),
        ('{"model": {"type": "Unigram"}}', "model: not a byte-level BPE"),
        ('{"model": {"vocab": {"a": "b"}}}', "expected an object of token: number"),
        ('{"model": {"vocab": {"\\u3042": 1}}}', "not a token of a byte-level BPE"),
    ]:
        (tmp_path / "tokenizer.json").write_text(contents)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


def test_a_tokenizer_is_used_exactly_or_refused_by_name(tokenizer, tmp_path, small_gpt):
    folder = tmp_path / "run"
    save_model(folder, small_gpt(vocab_size=1024), tokenizer)
    whole = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json")

    def written(change=(), beside=(), **others):
        write_json(folder / "tokenizer.json", whole | dict(change))
        write_json(folder / "tokenizer_config.json", settings | dict(beside))
        for name in ("added_tokens", "special_tokens_map", "generation_config"):
            write_json(folder / f"{name}.json", others.get(name, {}))
        return load_tokenizer(folder)

    def refused(message, *changes, **others):
        with pytest.raises(ValueError, match=message):
            written(*changes, **others)

    refused("tokenizer.json: normalizer: not", {"normalizer": {"type": "Lowercase"}})
    ends = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": END_OF_TEXT}}]
    refused("post_processor: not", {"post_processor": {"type": "RobertaProcessing"}})
    template = {"type": "TemplateProcessing", "single": ends}
    refused("post_processor: not", {"post_processor": template})
    template = {"type": "TemplateProcessing", "single": ends[::-1]}  # begins with it
    assert written({"post_processor": template}).bos == tokenizer.eot_token
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    assert encode(written({"post_processor": both}), "My", None, 9)[0][0] == tokenizer.eot_token
    nothing = {"type": "TemplateProcessing", "single": ends[:1]}  # as transformers 5 writes GPT-2's
    assert tokenizer_hash(written({"post_processor": nothing})) == tokenizer_hash(tokenizer)
    words = whole["pre_tokenizer"]
    spaces = {"type": "Metaspace", "replacement": "_"}  # SentencePiece's
    for one in (spaces, {"type": "Sequence", "pretokenizers": [spaces, words]}):
        refused("json: pre_tokenizer: not a byte-level BPE's", {"pre_tokenizer": one})
    refused("json: pre_tokenizer: not", {"pre_tokenizer": words | {"use_regex": False}})
    refused("json: add_prefix_space: not", {"pre_tokenizer": words | {"add_prefix_space": True}})
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        refused(f"json: model.{name}: not", {"model": whole["model"] | {name: "x"}})
    refused("eos_token: '<|im_end|>' is no token", special_tokens_map={"eos_token": "<|im_end|>"},
            beside={"eos_token": "<|im_end|>"})  # fmt: skip
    refused("json: add_prefix_space: not", (), {"add_prefix_space": True})
    refused("json: add_bos_token: not", (), {"add_bos_token": True})
    damaged = f"{re.escape(str(folder))}: its tokenizer's files are damaged: "
    refused(damaged, {"added_tokens": [3]})
    refused(f"{damaged}.*'one'", (), {"added_tokens_decoder": {"one": {"content": "<s>"}}})
    split = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    split = {"type": "Sequence", "pretokenizers": [split, words | {"use_regex": False}]}
    refused(f"{damaged}.*Opening parenthesis", {"pre_tokenizer": split})
    same = {"content": "<s>", "id": 7}
    refused("two of its tokens have one number", {"added_tokens": [*whole["added_tokens"], same]})

    # Tokens that were added have numbers, and no text has them; one may end a response.
    more = [{"content": "<|im_end|>", "id": 1024}, {"content": "[PAD]", "id": 1030}]
    found = written({"added_tokens": whole["added_tokens"] + more}, {"eos_token": "<|im_end|>"})
    assert found.n_vocab == 1031 and found.eot_token == 1024 and found.ends == (1024, 1023)
    text = "<|im_end|> [PAD] <|endoftext|>"
    assert found.encode_ordinary(text) == tokenizer.encode_ordinary(text)
    assert text_of(found, [1024, 1027, 1030]) == "<|im_end|>\ufffd[PAD]"
    found = written(
        {"added_tokens": whole["added_tokens"] + more},
        generation_config={"eos_token_id": [1024, 50256]},  # no token has the second number
    )
    assert found.ends == (tokenizer.eot_token, 1024)
    save_model(tmp_path / "again", small_gpt(vocab_size=1040), found)
    again = load_tokenizer(tmp_path / "again")
    assert again.ends == found.ends and tokenizer_hash(again) == tokenizer_hash(found)
    for name, text in found.files.items():
        assert (tmp_path / "again" / name).read_text() == text

    # The end of text at another place than the last: as Hugging Face's course trains them.
    vocab = whole["model"]["vocab"]
    first = {token: (rank + 1) % 1024 for token, rank in vocab.items()}  # which was the last
    added = [whole["added_tokens"][0] | {"id": 0}]
    first_last = {"model": whole["model"] | {"vocab": first}, "added_tokens": added}
    for merges in (whole["model"]["merges"][::-1], whole["model"]["merges"][:9]):
        change = {"model": whole["model"] | {"merges": merges}}
        refused("tokens are not numbered in the order of their merges", change)
    other, text = written(first_last), "How do I fix a bike?"
    assert other.eot_token == 0
    assert other.encode_ordinary(text) == [i + 1 for i in tokenizer.encode_ordinary(text)]


def test_a_million_spaces_are_tokens_too(tokenizer):
    text = "a" + " " * 1_000_000 + "\n" * 250_000 + "b"
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    text = "a  b\n\n" * 30_000 + " " * 99_999 + "c"  # nothing here has to be taken apart
    assert tokenizer.encode_ordinary(text) == tokenizer.encode_ordinary(text)


def test_gpt2_vocabulary_without_cache_or_network(tmp_path):
    """In a process of its own, since tiktoken keeps what it has loaded."""
    code = (
        "import tiktoken.load\n"
        "def offline(*args, **kwargs): raise ConnectionError('no network')\n"
        f"os.environ['TIKTOKEN_CACHE_DIR'] = {str(tmp_path)!r}\n"
        "tiktoken.load.read_file = offline\n"
        "model.load_tokenizer('gpt2')"
    )
    done = on_ranks("model", code, 1)
    assert "Set TIKTOKEN_CACHE_DIR to a folder" in done.stderr.splitlines()[-1]


# --- conversations --------------------------------------------------------------------------------

MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
TURNS = [
    {"role": "user", "content": "My car is old."},
    {"role": "assistant", "content": " Sell it. "},
    {"role": "user", "content": "Why <|im_end|> <|eot_id|>?"},
]
LAID_OUT = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nMy car is old."
    "<|im_end|>\n<|im_start|>assistant\n Sell it. <|im_end|>\n<|im_start|>user\n"
    "Why <|im_end|> <|eot_id|>?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nMy car is old.<|eot_id|><|start_header_id|>"
    "assistant<|end_header_id|>\n\nSell it.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Why <|im_end|> <|eot_id|>?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}


def talking(tokenizer, name):
    """The embedded task's tokenizer with a template's special tokens."""
    ranks = {tokenizer.decode_single_token_bytes(rank): rank for rank in range(1023)}
    special = {token: 1024 + i for i, token in enumerate(MARKS[name])} | {END_OF_TEXT: 1023}
    made = Tokenizer("talking", ranks, special)
    lay_out(made)
    return made


@pytest.mark.parametrize("name", MARKS)
def test_a_conversation_is_laid_out(tokenizer, name):
    """As its template says; special tokens come from the template alone."""
    found = talking(tokenizer, name)
    system = {"role": "system", "content": "Be brief."}
    ids, response = encode(found, Conversation([system, *TURNS]), "It is.", 999)
    assert text_of(found, ids) == LAID_OUT[name]
    end = found.special[MARKS[name][-1]]
    assert found.template == name and found.ends == (end, 1023)
    assert response == [*tokenizer.encode_ordinary("It is."), end]
    assert ids.count(end) == 4  # one a turn, none of the user's own
    alone = encode(found, "My car is old.", None, 999)[0]
    assert alone == encode(found, Conversation(TURNS[:1]), None, 999)[0]
    assert encode(found, "", "It is.", 999)[0] == [end]  # no conversation: plain language
    lay_out(found, "none")
    plain = Conversation([system, *TURNS])
    assert str(plain).startswith("system: Be brief.\n\nuser: My car")
    assert encode(tokenizer, plain, None, 999)[0] == tokenizer.encode_ordinary(str(plain))


def test_words_of_a_models_own_system(tokenizer):
    """Of its own chat template: what its system says where nothing else is said, or says first."""
    own = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
    )
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    for name, template, default, other in [
        ("chatml", own, "Be kind.", "Be brief."),
        ("chatml", "{{ '<|im_start|>system\\n' + system + '<|im_end|>' }}", None, "Be brief."),
        (
            "chatml",
            own.replace("Be kind.", "You\\'re kind.\\nTruly."),
            "You're kind.\nTruly.",
            "Be brief.",
        ),
        (
            "llama3",
            '{{ "Cutting Knowledge Date: December 2023\\n<|eot_id|>" }}',
            dates,
            f"{dates}Be brief.",
        ),
    ]:
        found = talking(tokenizer, name)
        found.files = {"tokenizer_config.json": json.dumps({"chat_template": template})}
        lay_out(found)
        system = {"role": "system", "content": "Be brief."}
        ids = encode(found, Conversation([system, *TURNS]), None, 999)[0]
        assert text_of(found, ids) == LAID_OUT[name].replace("Be brief.", other)
        before, turns = LAID_OUT[name].split("Be brief.")
        said = before + default + turns if default else turns[turns.index("<|im_start|>") :]
        assert text_of(found, encode(found, Conversation(TURNS), None, 999)[0]) == said


def test_a_chat_template_that_is_neither(tokenizer):
    """It is refused, unless prompts are to be plain text; of several, the default one counts."""
    other = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    found = talking(tokenizer, "chatml")
    for template in (other, [{"name": "default", "template": other}]):
        found.files = {"tokenizer_config.json": json.dumps({"chat_template": template})}
        with pytest.raises(ValueError, match="chat_template: is neither ChatML's nor Llama 3's"):
            lay_out(found)
        found.template = None
        lay_out(found, "none")
        assert found.template is None
    both = [{"name": "tools", "template": other}, {"name": "default", "template": "<|im_end|>"}]
    found.files = {"tokenizer_config.json": json.dumps({"chat_template": both})}
    lay_out(found)
    assert found.template == "chatml"


def test_what_is_no_conversation():
    good = {"role": "user", "content": "Hi."}
    spoken = {"role": "assistant", "content": "Hi."}
    others = (
        [good | {"role": "me"}],
        [good | {"content": 3}],
        [good, spoken],
        [good | {"content": " "}],
    )
    for messages in ([], ["Hi."], [{"role": "user"}], *others):
        with pytest.raises(ValueError, match="expected messages"):
            Conversation(messages)


def test_conversations_are_equal_by_their_turns():
    """Not by their texts, as files are matched by prompts: one turn may spell two."""
    two = Conversation([*TURNS[:2], {"role": "user", "content": "Why?"}])
    first, rest = two.split("\n\n", 1)
    one = Conversation([{"role": "user", "content": f"{TURNS[0]['content']}\n\n{rest}"}])
    assert first == "user: My car is old." and str(one) == str(two)
    assert one != two and two != str(two) and str(two) != two and two == Conversation(two.messages)
    found = {one: 1, two: 2, str(two): 3}
    assert [found[Conversation(x.messages)] for x in (one, two)] == [1, 2] and len(found) == 3


@pytest.mark.parametrize("name", [*MARKS, "none"])
def test_a_template_stays_with_a_run(tokenizer, tmp_path, small_gpt, name):
    """In config.json, and in the files that other tools read."""
    both = {token: 1024 + i for i, token in enumerate(MARKS["chatml"] + MARKS["llama3"])}
    save_model(tmp_path / "base", small_gpt(vocab_size=1040), tokenizer)
    whole = read_json(tmp_path / "base/tokenizer.json")
    whole["added_tokens"] += [{"content": token, "id": i} for token, i in both.items()]
    write_json(tmp_path / "base/tokenizer.json", whole)
    config = read_json(tmp_path / "base/config.json")
    del config["template"], config["tokenizer"]
    write_json(tmp_path / "base/config.json", config)
    write_json(tmp_path / "base/generation_config.json", {"eos_token_id": 1023, "top_p": 0.9})
    assert load_tokenizer(tmp_path / "base").template == "chatml"  # the first that fits
    found = load_tokenizer(tmp_path / "base", name)
    save_model(tmp_path / "run", small_gpt(vocab_size=1040), found)
    again = load_tokenizer(tmp_path / "run")
    assert again.template == (None if name == "none" else name) and again.ends == found.ends
    assert again.template == read_json(tmp_path / "run/config.json")["template"]
    settings = read_json(tmp_path / "run/tokenizer_config.json")
    assert ("chat_template" in settings) == (name != "none")
    if name != "none":
        assert settings["eos_token"] == MARKS[name][-1]
        ends = [both[MARKS[name][-1]], 1023]
        stops = read_json(tmp_path / "run/generation_config.json")
        assert stops == {"eos_token_id": ends, "top_p": 0.9}
        assert read_json(tmp_path / "run/config.json")["eos_token_id"] == ends
    with pytest.raises(ValueError, match=r"--template llama3: .* has not its special tokens"):
        lay_out(tokenizer, "llama3")


# --- files ----------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("interrupted")
    message = r"file.json: could not be written: .*No space"
    with pytest.raises(OSError, match=message), whole_file(path):
        raise OSError(28, "No space left on device")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_template_needs_its_tokens(tokenizer, tmp_path):
    """Also where the tokenizer is a file of ranks; two that lay out otherwise are two."""
    path = tmp_path / "bytes.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    with pytest.raises(ValueError, match=r"--template chatml: .* has not its special tokens"):
        load_tokenizer(path, "chatml")
    assert load_tokenizer(path, "none").template is None
    one, other = talking(tokenizer, "chatml"), talking(tokenizer, "chatml")
    assert identity(one) == identity(other)
    other.template = None
    assert identity(one) != identity(other) and tokenizer_hash(one) == tokenizer_hash(other)


def test_another_models_chat_template_does_not_stay(tokenizer):
    """Where prompts are laid out otherwise than its files say, those of a run say how."""
    found = talking(tokenizer, "chatml")
    for files in (
        {"tokenizer_config.json": json.dumps({"chat_template": "<|user|>"})},
        {"tokenizer_config.json": "{}", "chat_template.jinja": "<|user|>"},
    ):
        found.files = files
        files = with_template(found)
        assert "chat_template.jinja" not in files
        template = json.loads(files["tokenizer_config.json"])["chat_template"]
        assert template == TEMPLATES["chatml"][2]
    own = {"tokenizer_config.json": json.dumps({"chat_template": "a<|im_end|>b"})}
    found.files = own
    assert (
        json.loads(with_template(found)["tokenizer_config.json"])["chat_template"] == "a<|im_end|>b"
    )
