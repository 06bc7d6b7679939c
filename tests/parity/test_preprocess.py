"""The runtime's preprocessing against Hugging Face's own processor and tokenizer."""

import json

import numpy as np
import pytest
from makers import originals
from makers.checkpoints import REFSHAPES as CHECKPOINT
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlavaImageProcessorPil, PreTrainedTokenizerFast

from gap_export.blocks.hf_config import FRACTION_BOX
from gap_export.checkpoint.tokenizer import read_tokenizer
from gap_runtime.bundle.manifest import Prompt
from gap_runtime.errors import InputError
from gap_runtime.grounding.prompt import PromptEncoder, load_tokenizer
from gap_runtime.pictures.load import make_pixels, to_rgb
from gap_runtime.pictures.preprocess import Bucket, Preprocess

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FILL = (122, 116, 104)
ROWS = 10**6
# Of a family whose pictures all take the same road.
BUCKET = Bucket(name="", canvas=None, grids=((8, 8),), strip=1, fixed=())
TEMPLATES = (
    "USER: <image>\nWhere is {phrase}? ASSISTANT:",
    "A chat. USER: <image>\n{phrase}\nASSISTANT:",
)
PHRASES = (
    "the red circle",
    "the left blue square",
    "the big yellow one",
    "cross",
    "The RED Circle!",
    "a man's t-shirt, the 2nd from the left",
    "mug (half-full) 50% [0.1, 0.2]",
    "the  cup",
    "café crème",
    "cafe\u0301",
    "größe straße",
    "красный круг",
    "赤い丸",
    "빨간 원",
    "الدائرة الحمراء",
    "लाल गोला",
    "🔴 the circle 👩‍🚀",
    "\ufb01sh \u2163 \u00bd",
    "zero\u200bwidth",
    "non\u00a0breaking",
    "\u2581the\u2581circle",
    "x" * 300,
    "\x01\x7f",
    "USER: ASSISTANT:",
)


def make_picture(width, height, mode="RGB", seed=0):
    """Soft colours with sharp edges, so that every filter differs from every other."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(rows / (3 + k) + columns / (5 - k)) for k in range(3)]
    values = np.stack(waves, axis=-1) + rng.integers(-20, 20, (height, width, 3))
    values[height // 3 :, : width // 2] += 60
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)


def make_spec(side, mode="pad"):
    return Preprocess(mode=mode, side=side, fill=FILL, mean=MEAN, std=STD, canvases=())


def huggingface_pixels(picture, side, *, pad=True):
    size = {"shortest_edge": side} if pad else {"height": side, "width": side}
    processor = LlavaImageProcessorPil(
        do_pad=pad,
        background_color=FILL,
        size=size,
        crop_size={"height": side, "width": side},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return processor(picture, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("mode", ["pad", "stretch"])
@pytest.mark.parametrize("side", [112, 336])
@pytest.mark.parametrize(
    "size",
    [
        (112, 112),
        (336, 336),
        (200, 200),
        (90, 160),
        (91, 160),
        (161, 90),
        (400, 33),
        (33, 401),
        (640, 480),
        (1, 1),
        (2, 3),
        (1, 50),
    ],
)
def test_pixels_equal_hugging_faces(size, side, mode):
    picture = make_picture(*size)
    pixels = make_pixels(picture, make_spec(side, mode), BUCKET)
    expected = huggingface_pixels(picture, side, pad=mode == "pad")
    assert pixels.shape == expected.shape == (1, 3, side, side)
    assert np.abs(pixels - expected).max() <= 1e-5


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_other_modes_equal_hugging_faces(mode):
    picture = make_picture(120, 77, "L" if mode == "LA" else "RGB").convert(mode)
    pixels = make_pixels(to_rgb(picture), make_spec(112), BUCKET)
    assert np.abs(pixels - huggingface_pixels(picture.convert("RGB"), 112)).max() <= 1e-5


@pytest.fixture(scope="module", params=["auto", "fast"])
def tokenizer(request):
    if request.param == "auto":
        return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    return PreTrainedTokenizerFast.from_pretrained(CHECKPOINT, local_files_only=True)


def make_encoder(template):
    prompt = Prompt(template=template, image_token="<image>", tokenizer=None, stop_ids=(2,))
    return PromptEncoder(load_tokenizer(CHECKPOINT / "tokenizer.json"), prompt, rows=ROWS)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("phrase", PHRASES)
def test_prompt_tokens_equal_hugging_faces(tokenizer, template, phrase):
    phrase = " ".join(phrase.split())
    ids = tokenizer(template.format(phrase=phrase))["input_ids"]
    image = json.loads((CHECKPOINT / "config.json").read_text("utf-8"))["image_token_index"]
    at = ids.index(image)
    encoded = make_encoder(template).encode(phrase)
    assert encoded.prefix == ids[:at]
    assert encoded.suffix == ids[at + 1 :]


def test_prompt_begins_with_the_models_begin_token(tokenizer):
    encoded = make_encoder(TEMPLATES[0]).encode("the red circle")
    assert encoded.prefix[0] == tokenizer.bos_token_id


def test_phrases_differ_in_their_tokens():
    suffixes = {tuple(make_encoder(TEMPLATES[0]).encode(phrase).suffix) for phrase in PHRASES}
    assert len(suffixes) == len(PHRASES)


def test_image_token_in_the_phrase_is_refused_by_the_real_tokenizer():
    with pytest.raises(InputError, match="holds the image token"):
        make_encoder(TEMPLATES[0]).encode("the <image> circle")


@pytest.mark.parametrize("legacy", [True, False, None])
def test_older_tokenizer_files_become_one_that_reads_as_their_library_did(tmp_path, legacy):
    """SentencePiece's model has no image token: both sides of the picture are encoded apart.

    The truth is SentencePiece itself, whatever `legacy` says, as no text has an added token. (The
    library of today puts no space before a text that begins with one; older ones did.)
    """
    folder = originals.make_sentencepiece(tmp_path / "old", legacy=legacy)
    read_tokenizer(folder).save(str(tmp_path / "tokenizer.json"))
    library = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encode = processor.encode
    for template in TEMPLATES:
        prompt = Prompt(template=template, image_token=None, tokenizer=None, stop_ids=(2,))
        encoder = PromptEncoder(load_tokenizer(tmp_path / "tokenizer.json"), prompt, rows=ROWS)
        for phrase in (" ".join(each.split()) for each in PHRASES):
            before, _, after = template.format(phrase=phrase).partition("<image>")
            encoded = encoder.encode(phrase)
            assert encoded.prefix == [library.bos_token_id, *encode(before)]
            assert encoded.suffix == encode(after)
            assert library.bos_token_id not in encoded.suffix
            assert encoder.encode_phrase(phrase) == encode(phrase)
            ids = [*encoded.suffix, library.eos_token_id]
            expected = library.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            assert encoder.decode(ids) == expected.strip()


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert read_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    "answer", ["[0.12, 0.34, 0.56, 0.78]", "[0.00, 0.05, 1.00, 0.95]", "the red circle is there."]
)
def test_answers_are_decoded_as_hugging_face_does(tokenizer, answer):
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    expected = tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    ).strip()
    assert make_encoder(TEMPLATES[0]).decode(ids) == expected == answer


def test_fill_is_the_mean_as_hugging_face_pads():
    assert tuple(int(value * 255) for value in MEAN) == FILL


def test_the_pattern_in_the_runtimes_tests_is_the_exporters():
    # tests/runtime/conftest.py holds a copy, because those tests run without gap_export.
    number = r"\s*(-?\d+(?:\.\d+)?)\s*"
    assert FRACTION_BOX.pattern == rf"\[{number},{number},{number},{number}\]"
