"""Prompts as token IDs, against sequences that the tokenizers of the models' own time gave.

Written down from slow tokenizers: transformers 4.28.1 and 4.30.2 (`stripped`), 4.37.2 (`pieces`),
on the files that the makers write. A text in a sequence stands for its pieces as a sentence of its
own, by SentencePiece itself; one in a list for its pieces as it stands.
"""

import json

import pytest
import sentencepiece
from makers import originals

from gap_export.checkpoint.sentencepiece import read_proto
from gap_export.checkpoint.tokenizer import read_tokenizer, write_tokenizer
from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.errors import CheckpointError
from gap_export.reference.tokenizer import EagerTokenizer

START, PATCH, END = "<im_start>", "<im_patch>", "<im_end>"
ADDED = {PATCH: 400, START: 401, END: 402}
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}

STRIPPED = {
    f"A chat. USER: In {START}{PATCH}{END}, I need the red box.": (
        *("A chat. USER: In", START, PATCH, END),
        ", I need the red box.",
    ),
    f"USER: {START}": ("USER:", START),
    f"{END}\nPlease": (END, "Please"),
    f"a  {START}  b\n<s> c <s>d": ("a", START, "b\n", "<s>", " c ", "<s>", "d"),
    "<s>[INST] <Img>": ("<s>", "[INST] <Img>"),
    "</Img> [refer] give me the location of \u00e9\u6f22 [/INST]": (
        "</Img> [refer] give me the location of \u00e9\u6f22 [/INST]",
    ),
    "USER: where is\nthe  purple hexagon? ": ("USER: where is\nthe  purple hexagon? ",),
    "": (),
}
PIECES = {
    f"A chat. USER: In {START}{PATCH}{END}, I need the red box.": (
        *("A chat. USER: In ", START, PATCH, END),
        ", I need the red box.",
    ),
    f"USER: {START}": ("USER: ", START),
    f"{END}\nPlease": (END, "\nPlease"),
    f"a  {START}  b\n<s> c <s>d": ("a  ", START, "  b\n", "<s>", " c ", "<s>", "d"),
    "<s>[INST] <Img>": ("<s>", "[INST] <Img>"),
    "": (),
}
GOES_ON = {
    f"A chat. USER: In {START}{PATCH}{END}, I need the red box.": (
        *(["\u2581A chat. USER: In "], START, PATCH, END),
        [", I need the red box."],
    ),
    f"USER: {START}": (["\u2581USER: "], START),
    f"a  {START}  b\n<s> c <s>d": (
        *(["\u2581a  "], START, ["  b\n"], "<s>", [" c "], "<s>"),
        ["d"],
    ),
    "<s>[INST] <Img>": ("<s>", ["[INST] <Img>"]),
    " red box": (["\u2581 red box"],),
    "  red": (["\u2581  red"],),
    "\u2581red \u2581box": (["\u2581\u2581red \u2581box"],),
    " <s> red": (["\u2581 "], "<s>", [" red"]),
    " ": (["\u2581 "],),
    "<s>": ("<s>",),
    f"<unk>{END}\u2581, x": ("<unk>", END, ["\u2581, x"]),
    "": (),
}
FRAMED = {
    f"{END}\nPlease": (["\u2581"], END, ["\nPlease"]),
    f"{END}<s>x": (["\u2581"], END, "<s>", ["x"]),
}
NAMED = {f"{END}\nPlease": (END, ["\nPlease"]), f"{END}<s>x": (END, "<s>", ["x"]), START: (START,)}


@pytest.fixture
def make(tmp_path):
    """A folder with tokenizer files in one of the forms that they come in."""

    def write(form, *, added=tuple(ADDED), legacy=None):
        folder = originals.make_sentencepiece(tmp_path / form, added=added, legacy=legacy)
        if form != "model":
            kind, *flags = form.split("-")
            originals.make_tokenizer_json(
                folder,
                added=added,
                form="metaspace" if kind == "metaspace" else "prepend",
                normalized="normalized" in flags,
                whole="whole" in flags,
            )
            if kind != "both":
                (folder / "tokenizer.model").rename(folder / "sentencepiece")
        return folder

    return write


def expect(folder, sequence):
    """The IDs of a sequence, after the token that begins every prompt."""
    path = next(
        folder / name for name in ("tokenizer.model", "sentencepiece") if (folder / name).is_file()
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    proto = read_proto(path)
    proto.normalizer_spec.add_dummy_prefix = False
    plain = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokens = ADDED | SPECIAL
    ids = [1]
    for part in sequence:
        if isinstance(part, list):
            ids += plain.encode(*part)
        else:
            ids += [tokens[part]] if part in tokens else processor.encode(part)
    return ids


def check(files, sequences):
    """The bundle's tokenizer and the reference's, which share no code that encodes."""
    tokenizer, eager = read_tokenizer(files), EagerTokenizer(files)
    for text, sequence in sequences.items():
        expected = expect(files.folder, sequence)
        assert tokenizer.encode(text).ids == expected, text
        assert eager.encode(text, special=True) == expected, text
        assert eager.encode(text, special=False) == expected[1:], text
        shown = tokenizer.decode(expected).strip()
        assert eager.decode(expected) == shown


FORMS = (
    "model",
    "both-normalized",
    "prepend",
    "prepend-normalized",
    "prepend-normalized-whole",
    "metaspace",
    "metaspace-normalized-whole",
)


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("form", FORMS)
def test_texts_around_added_tokens_lose_their_spaces(make, form, legacy):
    folder = make(form, legacy=legacy)
    check(TokenizerFiles(folder=folder, rule="stripped", added=tuple(ADDED)), STRIPPED)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [None, True])
def test_texts_between_added_tokens_begin_sentences(make, form, legacy):
    folder = make(form, legacy=legacy)
    check(TokenizerFiles(folder=folder, rule="pieces", added=tuple(ADDED)), PIECES)


# Where `legacy` is false: a text begins a sentence as a whole, its own first spaces and all, and
# what is right of an added token goes on. Of added tokens those that have a part (`<s>`, or one
# that the authors' code was the first to add) take the space before the text away, others do not.


@pytest.mark.parametrize("form", FORMS)
def test_where_legacy_is_off_the_text_goes_on(make, form):
    files = TokenizerFiles(folder=make(form, legacy=False), rule="pieces", added=tuple(ADDED))
    check(files, GOES_ON | FRAMED)


@pytest.mark.parametrize("form", FORMS)
def test_where_legacy_is_off_a_token_that_the_code_adds_begins_a_text(make, form):
    folder = make(form, added=(), legacy=False)
    files = TokenizerFiles(folder=folder, rule="pieces", added=tuple(ADDED))
    check(files, GOES_ON | NAMED)


def test_where_legacy_is_off_a_named_token_begins_a_text(make):
    folder = make("model", legacy=False)
    path = folder / "special_tokens_map.json"
    named = json.loads(path.read_text(encoding="utf-8"))
    named["additional_special_tokens"] = [END, START]
    path.write_text(json.dumps(named), encoding="utf-8")
    check(TokenizerFiles(folder=folder, rule="pieces"), GOES_ON | NAMED)


def test_a_config_that_numbers_the_tokens_names_them_too(make):
    """From transformers 4.34 on: the map beside it is not looked at."""
    folder = make("model", legacy=False)
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        str(number): {"content": content, "special": True} | flags
        for content, number in (SPECIAL | ADDED).items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    names = {"bos_token": "<s>", "additional_special_tokens": [END, START]}
    (folder / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    files = TokenizerFiles(folder=folder, rule="pieces")
    check(files, GOES_ON | FRAMED)
    config["additional_special_tokens"] = [END, START]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    check(files, GOES_ON | NAMED)


def test_where_legacy_is_off_a_token_takes_the_spaces_that_it_says(make):
    folder = make("model", legacy=False)
    flags = {"rstrip": False, "normalized": False, "single_word": False, "special": True}
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        str(number): {"content": content, "lstrip": content == END} | flags
        for content, number in (SPECIAL | ADDED).items()
    }
    config["additional_special_tokens"] = [END]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    texts = {
        f" {END} x": (END, [" x"]),
        f"a {END}, b": (["\u2581a"], END, [", b"]),
        f" {START}": (["\u2581 "], START),
    }
    check(TokenizerFiles(folder=folder, rule="pieces"), texts)


def test_tokens_that_no_file_has_follow_those_that_there_are(make):
    """Shikra's code adds them when it loads a base model's tokenizer."""
    folder = make("model", added=())
    check(TokenizerFiles(folder=folder, rule="stripped", added=tuple(ADDED)), STRIPPED)


def test_a_token_that_the_map_names_by_a_string_strips(make):
    """As transformers 4.28.1 takes it: only tokens with settings keep the spaces beside them."""
    folder = make("model")
    path = folder / "special_tokens_map.json"
    path.write_text(json.dumps({"bos_token": "<s>"}), encoding="utf-8")
    files = TokenizerFiles(folder=folder, rule="stripped", added=tuple(ADDED))
    check(files, {"a <s> b </s> c": ("a", "<s>", "b ", "</s>", " c")})


@pytest.mark.parametrize("form", ["prepend", "prepend-normalized", "metaspace"])
def test_a_file_that_counts_is_copied(make, form, tmp_path):
    folder = make(form)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    files = TokenizerFiles(folder=folder)
    write_tokenizer(files, read_tokenizer(files), tmp_path / "written.json")
    own = (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "written.json").read_bytes() == own


@pytest.mark.parametrize("switch", [True, False, None])
def test_llamas_class_begins_prompts_by_its_config(make, switch):
    """As LlamaTokenizerFast of transformers 4.37.2 did, whatever its tokenizer.json said."""
    folder = make("prepend-whole")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"add_bos_token": switch} if switch is not None else {}
    if switch is None:
        del config["add_bos_token"]
    path.write_text(json.dumps(config), encoding="utf-8")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if switch is not False:
        data["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    files = TokenizerFiles(folder=folder)
    expected = expect(folder, ("the red box",))[0 if switch is not False else 1 :]
    assert read_tokenizer(files).encode("the red box").ids == expected
    assert EagerTokenizer(files).encode("the red box", special=True) == expected


def test_a_model_that_is_no_bpe_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the red box", "the blue box"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=16,
        model_type="unigram",
        minloglevel=2,
    )
    with pytest.raises(CheckpointError, match=rf"{path}: a SentencePiece model that is no BPE"):
        read_tokenizer(TokenizerFiles(folder=tmp_path))


def test_an_expression_that_may_take_without_end_is_refused(make):
    """A stranger's own, in a file that is taken as it is."""
    folder = make("prepend")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated"}
    data["pre_tokenizer"] = {**slow, "invert": False}
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{path}: its regular expression .* too long"):
        read_tokenizer(folder)


FOREIGN = {
    "USER: In <im_start><im_patch><im_end> , where": [
        1,
        275,
        324,
        290,
        321,
        323,
        308,
        275,
        298,
        285,
        332,
        333,
        331,
        275,
        289,
        275,
        311,
        259,
        264,
    ],
    "<s>[INST] red": [1, 1, 262, 298, 301, 268, 293, 275, 264, 295],
    "  <im_end>  .  </s> In": [1, 331, 275, 284, 275, 275, 2, 275, 275, 298, 285],
    "<unk><im_patch>circle\n<s> ": [1, 0, 333, 273, 279, 278, 294, 266, 13, 1, 275, 275],
    "The 2nd, <im_patch> left": [
        1,
        275,
        291,
        259,
        275,
        312,
        285,
        295,
        289,
        333,
        275,
        266,
        297,
        280,
    ],
}
"""What transformers 4.30.2's slow tokenizer gave for 331 pieces and tokens in another order."""


def test_ids_of_another_vocabulary(tmp_path):
    added = ("<im_end>", "<im_start>", "<im_patch>")
    folder = originals.make_sentencepiece(tmp_path, vocabulary=331, legacy=None, added=added)
    tokenizer = read_tokenizer(TokenizerFiles(folder=folder, rule="stripped"))
    assert {text: tokenizer.encode(text).ids for text in FOREIGN} == FOREIGN
