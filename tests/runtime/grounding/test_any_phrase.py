"""Any text as a phrase: token IDs that say it, or one line."""

import pytest

from gap_runtime.errors import InputError
from gap_runtime.grounding.prompt import PromptEncoder, load_tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

PIECES = st.sampled_from(
    (
        *("the", "red", "mug", "<image>", "</s>", "<unk>", "{phrase}", "--", "\0", "\u202e"),
        *("\ud800", " ", "\n", "USER:", "ASSISTANT:", "\u3000", "<", "x" * 400, "\x1b[31m"),
    )
)
PHRASES = st.text(max_size=20) | st.lists(PIECES | st.text(max_size=3), max_size=8).map(" ".join)
ROWS = 12
MARKS = ("<image>", "</s>", "<unk>")


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(phrase=PHRASES)
def test_a_phrase_is_encoded_as_its_words_or_refused_in_a_line(tokenizer_file, prompt, phrase):
    tokenizer = load_tokenizer(tokenizer_file)
    encoder = PromptEncoder(tokenizer, prompt, rows=ROWS)
    words = phrase.split()
    if not words or not is_text(phrase) or any(mark in phrase for mark in MARKS):
        with pytest.raises(InputError) as caught:
            encoder.encode(phrase)
        said = str(caught.value)
        assert said.isprintable()
        assert len(said) < 500
        return
    found = encoder.encode(phrase)
    # One token a word, so the prompt is told by a dictionary.
    table = tokenizer.get_vocab()
    unknown = table["<unk>"]
    asked = [table.get(word, unknown) for word in ["Where", "is", *words, "?", "ASSISTANT:"]]
    assert found.prefix == [table["USER:"]]
    assert found.suffix == asked


def is_text(phrase):
    try:
        phrase.encode()
    except UnicodeEncodeError:
        return False
    return True
