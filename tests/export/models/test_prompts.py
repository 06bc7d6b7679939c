"""Every family's prompt: the tokens around the picture, and those that end an answer."""

import json

import pytest
import sentencepiece
from tokenizers import Tokenizer

from gap_runtime.grounding.prompt import PromptEncoder

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
    encoder = PromptEncoder(plan.tokenizer, plan.prompt)
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
            encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode(phrase)
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
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("the red circle")
    assert [*encoded.prefix, image, *encoded.suffix] == ids
    assert ids.count(image) == 1


def test_shikra_has_tokens_at_both_ends_of_the_picture(find, tmp_path):
    case = find("shikra")
    read = sentencepiece.SentencePieceProcessor(model_file=str(case.place() / "tokenizer.model"))
    added = json.loads((case.place() / "added_tokens.json").read_text("utf-8"))
    assert [added[name] for name in ("<im_patch>", "<im_start>", "<im_end>")] == [400, 401, 402]
    plan = case.plan(tmp_path / "b")
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("the red circle")
    assert (encoded.prefix[0], encoded.prefix[-1], encoded.suffix[0]) == (1, 401, 402)
    before, _, after = plan.spec.template.partition("<image>")
    assert read.decode(encoded.prefix[1:-1]).strip() == before.strip()
    assert read.decode(encoded.suffix[1:]) == after.replace("{phrase}", "the red circle")
    # With text around the picture whose spaces no version of the library moves.
    template = "A chat. USER: In<image> , I need the box of {phrase}. ASSISTANT:"
    plan = case.plan(tmp_path / "b", prompt__template=template)
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("it")
    assert encoded.prefix == [1, *read.encode("A chat. USER: In"), 401]
    assert encoded.suffix == [402, *read.encode(", I need the box of it. ASSISTANT:")]


def test_minigpt_begins_twice(find, tmp_path):
    case = find("minigpt-v2")
    folder = case.place("language")
    read = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    plan = case.plan(tmp_path / "b")
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("the red circle")
    assert encoded.prefix[:2] == [1, 1]
    assert 1 not in encoded.prefix[2:]
    assert read.decode(encoded.prefix[2:]) == "[INST] <Img>"
    after = "</Img> [refer] give me the location of the red circle [/INST]"
    assert encoded.suffix == read.encode(after)
    # With a space behind the token, which no version of the library leaves out.
    template = "<s> [INST] <Img><image></Img> find {phrase} [/INST]"
    plan = case.plan(tmp_path / "b", prompt__template=template)
    encoded = PromptEncoder(plan.tokenizer, plan.prompt).encode("it")
    assert encoded.prefix == [1, 1, *read.encode("[INST] <Img>")]
    assert encoded.suffix == read.encode("</Img> find it [/INST]")


def test_tokens_that_end_an_answer(plan, case):
    """Shikra's config on the hub names others, which are wrong."""
    if plan.tokenizer.token_to_id("<im_patch>") is None and plan.spec.image_token_id is not None:
        assert plan.spec.stop_ids == (plan.tokenizer.token_to_id("</s>"),)
    else:
        assert plan.spec.stop_ids == (2,)
    if case.name == "shikra":
        data = json.loads((case.place() / "config.json").read_text(encoding="utf-8"))
        assert data["eos_token_id"] == 1
