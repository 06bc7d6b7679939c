"""Every family's prompt: the tokens around the picture, and those that end an answer."""

import json

import pytest
import sentencepiece
from makers import originals
from tokenizers import Tokenizer

from gap_export.errors import CheckpointError
from gap_runtime.errors import InputError

PHRASES = (
    "x",
    "the red circle",
    "The RED Circle, the 2nd from the left!",
    "a man's t-shirt [0.1, 0.2]",
    "größe café",
    "赤い丸 🔴",
    "[INST] USER: ASSISTANT:",
    "word " * 12,
)


def test_the_prompt_around_the_picture(plan, eager, read):
    encoder = plan.encoder
    prefixes = set()
    for phrase in PHRASES:
        encoded = encoder.encode(phrase)
        prefixes.add(tuple(encoded.prefix))
        plain = " ".join(phrase.split())
        asked = plan.prompt.template.replace("{phrase}", plain)
        assert eager.encode(asked) == (encoded.prefix, encoded.suffix)
        assert encoder.encode_phrase(plain) == eager.encode_phrase(plain)
        if read is not None:
            assert encoder.encode_phrase(plain) == read.encode(plain)
    assert len(prefixes) == 1
    assert plan.layout.prefix == len(encoded.prefix)


def test_the_authors_llava_encodes_both_sides_apart(find, tmp_path):
    case = find("llava-original")
    read = sentencepiece.SentencePieceProcessor(model_file=str(case.place() / "tokenizer.model"))
    templates = (
        None,
        "A chat. USER: <image>\nPlease provide the box: {phrase} ASSISTANT:",
    )
    for template in templates:
        plan = case.plan(tmp_path / "b", prompt__template=template)
        before, _, after = (template or plan.spec.template).partition("<image>")
        for phrase in ("x", "the red circle"):
            encoded = plan.encoder.encode(phrase)
            assert encoded.prefix == [1, *read.encode(before)]
            assert encoded.suffix == read.encode(after.replace("{phrase}", phrase))


@pytest.mark.parametrize("name", ["llava", "llava-next-vicuna", "llava-next-mistral"])
def test_the_librarys_llava_encodes_the_prompt_as_one(find, tmp_path, name):
    case = find(name)
    plan = case.plan(tmp_path / "b")
    tokenizer = Tokenizer.from_file(str(case.place() / "tokenizer.json"))
    image = tokenizer.token_to_id("<image>")
    assert plan.spec.template.startswith("[INST]" if "mistral" in name else "USER:")
    ids = tokenizer.encode(plan.spec.template.replace("{phrase}", "the red circle")).ids
    encoded = plan.encoder.encode("the red circle")
    assert [*encoded.prefix, image, *encoded.suffix] == ids
    assert ids.count(image) == 1


def test_shikra_is_asked_as_its_authors_ask(find, tmp_path):
    """What their tokenizer (transformers 4.28.1) gave, piece by piece; no space beside a token."""
    case = find("shikra")
    read = sentencepiece.SentencePieceProcessor(model_file=str(case.place() / "tokenizer.model"))
    added = json.loads((case.place() / "added_tokens.json").read_text("utf-8"))
    assert [added[name] for name in ("<im_patch>", "<im_start>", "<im_end>")] == [400, 401, 402]
    encoded = case.plan(tmp_path / "b").encoder.encode("the red circle")
    before = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: In"
    )
    assert encoded.prefix == [1, *read.encode(before), 401]
    assert read.id_to_piece(encoded.prefix[-2]) == "\u2581In"
    assert [read.id_to_piece(token) for token in encoded.suffix[1:3]] == ["\u2581", ","]
    after = ", I need the bounding box coordinates of the red circle. ASSISTANT:"
    assert encoded.suffix == [402, *read.encode(after)]


@pytest.mark.parametrize("files", ["both", "json"])
@pytest.mark.parametrize("form", ["prepend", "metaspace"])
@pytest.mark.parametrize("normalized", [True, False])
def test_shikra_with_a_tokenizer_json(find, tmp_path, files, form, normalized):
    """The authors' own delta and merge scripts write one."""
    case = find("shikra").copy(tmp_path / "home")
    before = find("shikra").plan(tmp_path / "a").encoder.encode("the red circle")
    added = ("<im_patch>", "<im_start>", "<im_end>")
    originals.make_tokenizer_json(case.place(), added=added, form=form, normalized=normalized)
    if files == "json":
        (case.place() / "tokenizer.model").unlink()
    assert case.plan(tmp_path / "b").encoder.encode("the red circle") == before


def test_shikra_without_tokens_at_the_ends(find, tmp_path):
    case = find("shikra").copy(tmp_path / "home")
    config = case.place() / "config.json"
    data = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(data | {"mm_use_im_start_end": False}), encoding="utf-8")
    encoded = case.plan(tmp_path / "b").encoder.encode("x")
    assert not {401, 402} & {*encoded.prefix, *encoded.suffix}


@pytest.mark.parametrize("form", ["", "prepend", "metaspace"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_minigpt_is_asked_as_its_authors_ask(find, tmp_path, form, normalized, legacy):
    """What their tokenizer (transformers 4.30.2) gave, which knew no `legacy`."""
    case = find("minigpt-v2").copy(tmp_path / "home")
    folder = case.place("language")
    read = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"legacy": legacy}
    if legacy is None:
        del config["legacy"]
    path.write_text(json.dumps(config), encoding="utf-8")
    if form:
        originals.make_tokenizer_json(folder, form=form, normalized=normalized)
        (folder / "tokenizer.model").unlink()
    encoded = case.plan(tmp_path / "b").encoder.encode("the red circle")
    assert encoded.prefix == [1, 1, *read.encode("[INST] <Img>")]
    assert read.id_to_piece(encoded.prefix[2]) == "\u2581["
    after = "</Img> [refer] give me the location of the red circle [/INST]"
    assert encoded.suffix == read.encode(after)


def test_tokens_added_after_training(find, tmp_path):
    """They have no row in the embedding table: no phrase may hold one, all others are served."""
    case = find("llava-original").copy(tmp_path / "home")
    numbers = json.dumps({"<loc>": 400, "<box>": 401})
    (case.place() / "added_tokens.json").write_text(numbers, encoding="utf-8")
    plan = case.plan(tmp_path / "b")
    before = find("llava-original").plan(tmp_path / "a").encoder.encode("the red box")
    assert plan.encoder.encode("the red box") == before
    with pytest.raises(InputError, match=r"holds '<box>', token 401, .* rows for 400 tokens"):
        plan.encoder.encode("the <box>")
    with pytest.raises(InputError, match=r"holds '<loc>', token 400"):
        plan.encoder.encode_phrase("the <loc>")
    template = "<loc> USER: <image>\n{phrase}"
    with pytest.raises(CheckpointError) as caught:
        case.plan(tmp_path / "b", prompt__template=template)
    assert str(caught.value).startswith(
        f"{case.place()}: the prompt holds '<loc>', token 400 of its tokenizer"
    )
    samples = case.samples / "samples.json"
    entries = [{"image": "picture.png", "phrase": "the <box>"}]
    samples.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(InputError, match=r"holds '<box>', token 401"):
        case.plan(tmp_path / "b", reference=True)


def test_a_tokenizer_with_more_pieces_than_the_table(find, tmp_path):
    case = find("llava-original").copy(tmp_path / "home")
    originals.make_sentencepiece(case.place(), vocabulary=513)
    with pytest.raises(CheckpointError) as caught:
        case.plan(tmp_path / "b")
    assert str(caught.value) == (
        f"{case.place()}: its tokenizer has 513 tokens, the embedding table 400 rows; give the "
        "tokenizer that belongs to this checkpoint"
    )


def test_tokens_that_end_an_answer(plan, case):
    """Shikra's config on the hub names others, which are wrong."""
    if plan.tokenizer.token_to_id("<im_patch>") is None and plan.spec.image_token_id is not None:
        end = "<|im_end|>" if case.name.startswith("internvl") else "</s>"
        assert plan.spec.stop_ids == (plan.tokenizer.token_to_id(end),)
    else:
        assert plan.spec.stop_ids == (2,)
    if case.name == "shikra":
        data = json.loads((case.place() / "config.json").read_text(encoding="utf-8"))
        assert data["eos_token_id"] == 1
