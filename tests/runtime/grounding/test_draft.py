"""Drafts: what the form forces, with tokenizers that keep digits apart and such that join them."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gap_runtime.grounding.draft import Drafter

LLAVA = "[0.##, 0.##, 0.##, 0.##]"
SHIKRA = "[0.###,0.###,0.###,0.###]"
MINIGPT = "{<##><##><##><##>}"
BOX = '{"bbox_2d": [123, 45, 678, 1000], "label": "the red mug"}'
QWEN = '```json\n[\n\t{"bbox_2d": [###, ###, ###, ###], "label": "{phrase}"}\n]\n```'
BEFORE = "? ASSISTANT:"


def make_tokenizer(*joined, metaspace=False):
    """Llama's form: pieces with a mark for the space before; `joined` are further pieces."""
    letters = sorted({*"▁?:ASITN[]{}<>,.;abcdefghijklmnopqrstuvwxyz0123456789"})
    words = ["▁A", "SS", "IST", "ANT", "▁ASSISTANT", *joined]
    vocabulary, merges = {"<unk>": 0}, []
    for letter in letters:
        vocabulary[letter] = len(vocabulary)

    def join(piece):
        if piece in vocabulary:
            return
        for length in range(len(piece) - 1, 0, -1):
            if piece[:length] in vocabulary and piece[length:] in vocabulary:
                break
        else:
            join(piece[:-1])
            length = len(piece) - 1
        merges.append((piece[:length], piece[length:]))
        vocabulary[piece] = len(vocabulary)

    for word in words:
        join(word)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return tokenizer


def tokens_of(tokenizer, answer):
    """The tokens of an answer behind the prompt's end."""
    before = tokenizer.encode(BEFORE, add_special_tokens=False).ids
    whole = tokenizer.encode(BEFORE + answer, add_special_tokens=False).ids
    assert whole[: len(before)] == before
    return whole[len(before) :]


def replay(drafter, answer, *, most=7):
    """A decoder that gives this answer whatever is drafted; calls, drafted and accepted tokens.

    The prefill is one of the calls.
    """
    said, calls, drafted, accepted = [], 0, 0, 0
    while len(said) < len(answer):
        draft, before, good = drafter.propose(said, most), list(said), 0
        calls, drafted = calls + 1, drafted + len(draft)
        while len(said) < len(answer):
            said.append(answer[len(said)])
            if good == len(draft) or draft[good] != said[-1]:
                break
            good += 1
        accepted += good
        if draft:
            drafter.learn(before, good)
    assert said == answer
    return calls, drafted, accepted


@pytest.mark.parametrize("metaspace", [False, True])
def test_a_box_of_llamas_digits_takes_a_third_of_the_calls(metaspace):
    """24 tokens and the stop token, one call each, without drafts."""
    tokenizer = make_tokenizer("▁[", metaspace=metaspace)
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    answer = tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")
    assert len(answer) == 24
    assert replay(drafter, answer) == (9, 16, 16)


@pytest.mark.parametrize(
    ("form", "answer", "tokens", "calls"),
    [
        (SHIKRA, " [0.123,0.456,0.789,0.999]", 25, 13),
        (MINIGPT, " {<12><34><56><78>}", 18, 9),
    ],
)
def test_other_forms_in_proportion(form, answer, tokens, calls):
    tokenizer = make_tokenizer("▁[", "▁{")
    found = tokens_of(tokenizer, answer)
    assert len(found) == tokens
    assert replay(Drafter(tokenizer, form, BEFORE), found)[0] == calls


def test_the_draft_follows_a_tokenizer_that_joins_pieces():
    tokenizer = make_tokenizer("▁[0.", "▁0.", "]", ".5", "12")
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    piece = tokenizer.token_to_id
    assert drafter.propose([], 7) == [piece("▁[0.")]
    first = tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")
    assert tokenizer.decode([first[1]]) == "12"
    assert drafter.propose(first[:2], 7) == [piece(","), piece("▁0.")]
    calls, drafted, accepted = replay(drafter, first)
    assert (calls, drafted - accepted) == (8, 0)


def test_a_piece_that_may_join_a_digit_is_not_drafted():
    """With `.5` a piece, the point before a digit is not forced."""
    tokenizer = make_tokenizer("▁[", ".5")
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    assert drafter.propose([], 7) == [tokenizer.token_to_id("▁["), tokenizer.token_to_id("0")]
    answer = tokens_of(tokenizer, " [0.51, 0.34, 0.56, 0.78]")
    calls, drafted, accepted = replay(drafter, answer)
    assert drafted == accepted
    assert calls <= 14


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (LLAVA, " [0.12, 0.34, 1.00, 0.78]"),
        (LLAVA, " [0.1, 0.345, 0.56, 0.78]"),
        (LLAVA, " [0.12, 0.34, 0.56, 0.78]; [0.12, 0.34, 0.56, 0.78]"),
        (MINIGPT, " {<5><100><56><0>}"),
        (MINIGPT, " {<5><100>"),
        (LLAVA, " no ring in the picture"),
        (LLAVA, "[0.12, 0.34, 0.56, 0.78]"),
        (LLAVA, ""),
    ],
)
def test_other_answers_are_still_given(form, answer):
    tokenizer = make_tokenizer("▁[")
    found = tokens_of(tokenizer, answer)
    drafter = Drafter(tokenizer, form, BEFORE)
    for _ in range(3):
        calls, drafted, accepted = replay(drafter, found)
        assert calls <= len(found) <= calls + accepted
        assert accepted <= drafted


def test_who_answers_in_other_words_is_soon_left_alone():
    tokenizer = make_tokenizer("▁[")
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    found = tokens_of(tokenizer, " a ring")
    drafted = [replay(drafter, found)[1] for _ in range(5)]
    assert drafted[0] > 0
    assert drafted[2:] == [0, 0, 0]


def test_a_box_behind_other_words_is_drafted_too():
    """As of models that say the phrase again before its box."""
    tokenizer = make_tokenizer("▁[[")
    form = "<box>[[###, ###, ###, ###]]<end>"
    said = tokens_of(tokenizer, "<ref>red cup<ref>")
    whole = tokens_of(tokenizer, "<ref>red cup<ref><box>[[12, 345, 67, 890]]<end>")
    assert whole[: len(said)] == said
    calls, _, accepted = replay(Drafter(tokenizer, form, BEFORE), whole)
    assert accepted >= 15
    assert calls <= len(whole) - accepted + 1
    drafter = Drafter(tokenizer, form, BEFORE)
    assert drafter.propose(tokens_of(tokenizer, "<ref>red cup"), 7) == []
    forced = tokens_of(tokenizer, "<box>[[")
    assert drafter.propose([*said, forced[0]], 7) == forced[1:]


def test_an_answer_may_leave_out_what_stands_before_its_box():
    tokenizer = make_tokenizer("▁[[")
    drafter = Drafter(tokenizer, "<ref>{phrase}<end><box>[[###, ###]]<end>", BEFORE).about("a cup")
    box = tokens_of(tokenizer, "<box>[[12, 345]]<end>")
    assert drafter.propose(box[:2], 7) == box[2:7]
    whole = tokens_of(tokenizer, "<ref>a cup<end><box>[[12, 345]]<end>")
    assert drafter.propose(whole[:2], 7) == whole[2:9]
    assert replay(drafter, box)[2] >= 9


def test_an_answer_without_the_space_is_learnt():
    """The first one is drafted with a space in vain, the next ones as the model writes them."""
    tokenizer = make_tokenizer("▁[")
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    found = tokens_of(tokenizer, "[0.12, 0.34, 0.56, 0.78]")
    assert replay(drafter, found) == (10, 18, 15)
    assert replay(drafter, found) == (9, 16, 16)


def test_a_draft_is_no_longer_than_asked():
    tokenizer = make_tokenizer("▁[")
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    assert len(drafter.propose([], 7)) == 3
    assert len(drafter.propose([], 2)) == 2
    assert drafter.propose([], 0) == []


def test_a_place_that_was_right_before_is_not_given_up_for_two_misses():
    tokenizer = make_tokenizer("▁[")
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    for _ in range(10):
        replay(drafter, tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]"))
    for _ in range(3):
        replay(drafter, tokens_of(tokenizer, " no ring"))
    assert drafter.propose([], 7) != []


REF = "<ref>{phrase}<ref><box>[[##,##,##,##]]<box>"


def make_words():
    tokenizer = make_tokenizer("▁the", "▁red", "mug", "ref", "box")
    return tokenizer, Drafter(tokenizer, REF, BEFORE)


def refer(tokenizer, phrase):
    return tokens_of(tokenizer, f"<ref>{phrase}<ref><box>[[12,34,56,78]]<box>")


def test_a_phrase_that_the_form_repeats_is_drafted():
    tokenizer, drafter = make_words()
    answer = refer(tokenizer, "the red mug")
    # Learnt from the first answer: it begins without a space.
    replay(drafter.about("the red mug"), answer)
    calls, drafted, accepted = replay(drafter.about("the red mug"), answer)
    assert len(answer) == 33
    # One for each of eight digits, and where more is forced than a draft holds; none in vain.
    assert (calls, drafted, accepted) == (11, 23, 23)


def test_what_was_learnt_of_a_place_holds_for_every_phrase():
    tokenizer, drafter = make_words()
    words = ("the red mug", "a dog", "the man on the left of it", "it", "a b c d e f", "the end")
    for phrase in words:
        answer = refer(tokenizer, phrase)
        calls, drafted, accepted = replay(drafter.about(phrase), answer)
        assert len(answer) <= calls + accepted
    assert drafted == accepted
    # Who says another thing instead is soon left alone there, and drafted before it.
    for letter in "abcdefghijklmn":
        answer = refer(tokenizer, "something")
        calls, drafted, accepted = replay(drafter.about(f"the {letter} mug"), answer)
    assert accepted >= 4
    assert calls <= len(answer) - accepted + 1


@pytest.mark.parametrize("phrase", ["#5", "{phrase}", "<ref>", "2 of 12", "[[1", "", "a  b"])
def test_no_phrase_changes_the_answer(phrase):
    tokenizer, drafter = make_words()
    for said in ("the mug", "a b", "the mug", "[[1", "2 of 12"):
        replay(drafter.about(phrase), refer(tokenizer, said))


def test_memory_does_not_grow_with_phrases():
    tokenizer, drafter = make_words()
    sizes = []
    for number in range(60):
        phrase = "the " + "abcdefghij"[number // 10] + "abcdefghij"[number % 10]
        replay(drafter.about(phrase), refer(tokenizer, phrase))
        sizes.append(len(drafter._known) + len(drafter._trust))
    assert max(sizes[30:]) <= max(sizes[:30])


def make_byte_tokenizer(before, *words):
    """Qwen's form: pieces of bytes, digits apart; the words are pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {letter: k for k, letter in enumerate(alphabet)}, []
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in (before, *words):
        piece = split.pre_tokenize_str(word)[0][0]
        for length in range(2, len(piece) + 1):
            if piece[:length] not in vocabulary:
                vocabulary[piece[:length]] = len(vocabulary)
                merges.append((piece[: length - 1], piece[length - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Split(Regex(r"\d|[^\s\w]+\n*|\s?[A-Za-z]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        (f"```json\n[\n\t{BOX}\n]\n```", 18),
        (f"[\n\t{BOX}\n]", 17),
        (BOX, 16),
    ],
)
def test_the_boxes_of_qwens_json(answer, calls):
    """The frame of the answer, and the phrase as its label, are drafted."""
    before = "assistant\n"
    words = ("```", "json", '{"', "bbox", " [", "],", "label", '":', " the", " red", "mug", '"}')
    tokenizer = make_byte_tokenizer(before, *words)
    said = tokenizer.encode(before + answer, add_special_tokens=False).ids
    said = said[len(tokenizer.encode(before, add_special_tokens=False).ids) :]
    drafter = Drafter(tokenizer, QWEN, before).about("the red mug")
    assert replay(drafter, said)[0] == calls < len(said) / 2


def make_follower(tokenizer, form=LLAVA):
    return Drafter(tokenizer, form, BEFORE, follow=True)


def ask(drafter, tokens, phrase="a cup"):
    """Calls, drafted and accepted tokens of an answer, which the drafter then keeps."""
    counts = replay(drafter.about(phrase), tokens)
    drafter.keep(tokens)
    return counts


def test_an_answer_that_stays_takes_a_call_for_eight_tokens():
    tokenizer = make_tokenizer("▁[")
    drafter = make_follower(tokenizer)
    tokens = tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")
    assert ask(drafter, tokens) == (9, 16, 16)
    for _ in range(3):
        assert ask(drafter, tokens) == (3, 21, 21)
    # Another phrase knows nothing of it, and this one still does.
    assert ask(drafter, tokens, "a mug") == (9, 16, 16)
    assert ask(drafter, tokens) == (3, 21, 21)


def test_digits_that_change_are_not_drafted_until_they_stay_again():
    tokenizer = make_tokenizer("▁[")
    drafter = make_follower(tokenizer)
    answers = [tokens_of(tokenizer, f" [0.1{n}, 0.34, 0.56, 0.78]") for n in range(8)]
    counts = [ask(drafter, each) for each in answers]
    # Found wrong twice; then the call before it ends where it begins.
    assert [calls for calls, _, _ in counts] == [9, 4, 4, 4, 4, 4, 4, 4]
    wasted = [drafted - accepted for _, drafted, accepted in counts]
    assert wasted[:3] == [0, wasted[1], wasted[1]]
    assert wasted[1] > 0
    assert wasted[3:] == [0, 0, 0, 0, 0]
    assert ask(drafter, answers[-1]) == counts[-1]
    assert ask(drafter, answers[-1]) == (3, 21, 21)


def test_without_it_the_last_answer_is_no_draft():
    """Of which at most the two digits that its size tells are sent."""
    tokenizer = make_tokenizer("▁[")
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    tokens = tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")
    assert [ask(drafter, tokens) for _ in range(3)] == 3 * [(9, 16, 16)]
    for _ in range(30):
        last = ask(drafter, tokens)
    assert last == (7, 18, 18)


def test_only_the_last_phrases_are_known():
    tokenizer = make_tokenizer("▁[")
    drafter = make_follower(tokenizer)
    tokens = tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")
    for number in range(65):
        ask(drafter, tokens, str(number))
    assert ask(drafter, tokens, "64")[0] == 3
    # Its size is known all the same.
    assert ask(drafter, tokens, "0")[0] == 7


def test_an_answer_of_another_form_is_no_draft():
    tokenizer = make_tokenizer("▁[")
    drafter = make_follower(tokenizer)
    ask(drafter, tokens_of(tokenizer, " there is no cup"))
    assert ask(drafter, tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")) == (9, 16, 16)


@pytest.mark.parametrize(
    ("form", "joined", "write"),
    [
        (LLAVA, ("▁[",), " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]"),
        # Two digits in a piece.
        (
            LLAVA,
            ("▁[0.", "▁0.", *map(str, range(10, 100))),
            " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]",
        ),
        (MINIGPT, ("▁{",), " {{<{:02}><{:02}><{:02}><{:02}>}}"),
    ],
)
def test_boxes_that_move_take_fewer_calls_whatever_the_tokenizer(form, joined, write):
    """Each answer is the true one, as `replay` asserts."""
    tokenizer = make_tokenizer(*joined)
    random = np.random.default_rng(0)
    plain, drafter = Drafter(tokenizer, form, BEFORE), make_follower(tokenizer, form)
    box, calls, calls_plain = np.array([20, 30, 60, 70]), 0, 0
    for _ in range(60):
        box = np.clip(box + random.integers(-2, 3, 4) * (random.random(4) < 0.5), 0, 99)
        tokens = tokens_of(tokenizer, write.format(*box))
        calls += ask(drafter, tokens)[0]
        calls_plain += replay(plain, tokens)[0]
    assert calls < 0.75 * calls_plain


def test_boxes_at_random_cost_no_more_calls():
    tokenizer = make_tokenizer("▁[")
    random = np.random.default_rng(0)
    drafter = make_follower(tokenizer)
    drafted = accepted = 0
    for _ in range(60):
        box = " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]".format(*random.integers(0, 100, 4))
        counts = ask(drafter, tokens_of(tokenizer, box))
        assert counts[0] <= 9
        drafted, accepted = drafted + counts[1], accepted + counts[2]
    assert accepted > 0.8 * drafted


def test_a_phrase_and_its_box_are_drafted_as_they_were_answered():
    tokenizer = make_tokenizer()
    form = "<ref>{phrase}<end><box>[[###, ###]]<end>"
    drafter = make_follower(tokenizer, form)
    for phrase in ("a cup", "the green cup"):
        tokens = tokens_of(tokenizer, f"<ref>{phrase}<end><box>[[123, 456]]<end>")
        first = ask(drafter, tokens, phrase)
        again = ask(drafter, tokens, phrase)
        assert again[0] == -(-len(tokens) // 8) < first[0]
        assert again[1] == again[2]


def test_a_draft_of_the_last_answer_is_no_longer_than_there_is_room():
    tokenizer = make_tokenizer("▁[")
    drafter = make_follower(tokenizer)
    tokens = tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")
    ask(drafter, tokens)
    for begun in range(len(tokens)):
        for most in (-1, 0, 1, 5, 7, 99):
            draft = drafter.propose(tokens[:begun], most)
            assert draft == tokens[begun : begun + max(0, min(most, 7))]


def test_a_phrase_that_stays_does_not_pay_for_one_that_moves():
    tokenizer = make_tokenizer("▁[")
    random = np.random.default_rng(0)
    drafter = make_follower(tokenizer)
    still = tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")
    wasted = []
    for _ in range(30):
        box = " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]".format(*random.integers(0, 100, 4))
        _, drafted, accepted = ask(drafter, tokens_of(tokenizer, box), "a dog")
        wasted.append(drafted - accepted)
        counts = ask(drafter, still)
    assert counts == (3, 21, 21)
    assert np.mean(wasted[10:]) < 8


def test_answers_of_two_lengths_by_turns_waste_little():
    tokenizer = make_tokenizer("▁[", "▁{")
    drafter = make_follower(tokenizer)
    answers = [tokens_of(tokenizer, f" [0.12, 0.34, 0.56, 0.78]{more}") for more in ("", " [0.9]")]
    wasted = []
    for turn in range(20):
        _, drafted, accepted = ask(drafter, answers[turn % 2])
        wasted.append(drafted - accepted)
    assert max(wasted[6:]) <= 2


def test_the_form_learns_nothing_of_the_last_answers_tokens():
    """A model whose answers have another form, which is given up and stays so."""
    tokenizer = make_tokenizer("▁[", "▁{")
    tokens = tokens_of(tokenizer, " at {12.34.56.78}")
    drafter = make_follower(tokenizer)
    counts = [ask(drafter, tokens) for _ in range(10)]
    assert len(set(counts[3:])) == 1
    assert counts[-1][1] == counts[-1][2]


def ask_boxes(drafter, tokenizer, boxes, write):
    """Calls and refused rows of an answer, in the mean, once the first 40 are known."""
    counts = [ask(drafter, tokens_of(tokenizer, write.format(*box))) for box in boxes]
    calls, drafted, accepted = np.mean(counts[40:], axis=0)
    return calls, drafted - accepted


def place(random, sides, most):
    """A box of such sides within a frame."""
    corner = random.integers(0, most - np.array(sides) + 1)
    return *corner, *(corner + sides)


@pytest.mark.parametrize(
    ("form", "joined", "write", "scale"),
    [
        (LLAVA, ("▁[",), " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]", 99),
        (SHIKRA, ("▁[",), " [0.{:03},0.{:03},0.{:03},0.{:03}]", 999),
        (MINIGPT, ("▁{",), " {{<{:02}><{:02}><{:02}><{:02}>}}", 99),
        (
            "[0.##, 0.##, 0.##, 0.##]",
            ("▁[0.", "▁0."),
            " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]",
            99,
        ),
    ],
)
def test_boxes_of_about_one_size_take_fewer_calls(form, joined, write, scale):
    """Of the four calls of a single row, two for most boxes need not be made."""
    tokenizer = make_tokenizer(*joined)
    random = np.random.default_rng(0)
    boxes = [
        place(random, np.array([0.12, 0.2]) * scale * random.uniform(0.9, 1.1, 2) // 1, scale)
        for _ in range(200)
    ]
    boxes = [tuple(map(int, box)) for box in boxes]
    tokens = tokens_of(tokenizer, write.format(*boxes[0]))
    plain = replay(Drafter(tokenizer, form, BEFORE), tokens)[0]
    calls, refused = ask_boxes(Drafter(tokenizer, form, BEFORE), tokenizer, boxes, write)
    assert plain - 2 < calls < plain - 1.4
    assert refused < 0.6


def test_boxes_of_any_size_cost_no_more_calls_and_few_rows():
    tokenizer = make_tokenizer("▁[")
    random = np.random.default_rng(0)
    boxes = [place(random, random.integers(1, 90, 2), 99) for _ in range(300)]
    write = " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]"
    calls, refused = ask_boxes(Drafter(tokenizer, LLAVA, BEFORE), tokenizer, boxes, write)
    assert calls <= 9
    assert refused < 1


def test_a_digit_in_a_piece_with_others_is_not_guessed():
    """The sizes tell one digit, and pieces of two hold more."""
    tokenizer = make_tokenizer("▁[0.", "▁0.", *map(str, range(10, 100)))
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    random = np.random.default_rng(0)
    for _ in range(60):
        box = place(random, (12, 20), 79)
        tokens = tokens_of(tokenizer, " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]".format(*box))
        _, drafted, accepted = ask(drafter, tokens)
        assert drafted == accepted


def test_a_box_with_its_phrase_behind_it_is_guessed_too():
    before = "<|im_start|>assistant\n"
    tokenizer = make_byte_tokenizer(before)
    drafter = Drafter(tokenizer, QWEN, before)
    start = len(tokenizer.encode(before, add_special_tokens=False).ids)
    random = np.random.default_rng(0)
    calls = []
    for number in range(80):
        phrase = f"mug {number} of [1, 2, 3, 4]"
        box = "[{}, {}, {}, {}]".format(*place(random, (120, 140), 900))
        answer = QWEN.replace("[###, ###, ###, ###]", box).replace("{phrase}", phrase)
        tokens = tokenizer.encode(before + answer, add_special_tokens=False).ids[start:]
        calls.append(ask(drafter, tokens, phrase)[0])
    assert np.mean(calls[40:]) < np.mean(calls[:4]) - 1


def test_memory_does_not_grow_with_answers_in_joined_digits():
    tokenizer = make_tokenizer("▁[0.", "▁0.", *map(str, range(10, 100)))
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    random = np.random.default_rng(0)
    for _ in range(600):
        box = " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]".format(*random.integers(10, 100, 4))
        assert ask(drafter, tokens_of(tokenizer, box))[0] <= 5
    assert len(drafter._known) == len(drafter._trust) == 1024


def test_a_follower_guesses_sizes_where_the_last_answer_is_not_trusted():
    tokenizer = make_tokenizer("▁[")
    random = np.random.default_rng(0)
    boxes = [place(random, (12, 20), 99) for _ in range(100)]
    write = " [0.{:02}, 0.{:02}, 0.{:02}, 0.{:02}]"
    assert ask_boxes(make_follower(tokenizer), tokenizer, boxes, write)[0] < 8


def test_a_guess_is_no_longer_than_there_is_room():
    tokenizer = make_tokenizer("▁[")
    drafter = Drafter(tokenizer, LLAVA, BEFORE)
    tokens = tokens_of(tokenizer, " [0.12, 0.34, 0.56, 0.78]")
    for _ in range(20):
        ask(drafter, tokens)
    begun = tokens.index(tokenizer.token_to_id("4")) + 1
    whole = drafter.propose(tokens[:begun], 7)
    assert whole == tokens[begun : begun + 5]
    for most in (-1, 0, 1, 4, 5):
        assert drafter.propose(tokens[:begun], most) == whole[: max(0, most)]
