"""The template and the incremental conversation, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvcapsule_gguf.chat.contents import Contents
from kvcapsule_gguf.chat.session import Session
from kvcapsule_gguf.chat.stats import CacheUse, ImageUse, break_even
from kvcapsule_gguf.chat.template import ChatTemplate
from kvcapsule_gguf.runtime.errors import KVCapsuleError
from kvcapsule_gguf.runtime.marker import MARKER

VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }}\n"
    "{% else %}ASSISTANT: {{ m['content'] }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TRIMMING = VICUNA.replace("m['content']", "m['content'] | trim")
TYPED = "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}|{% endfor %}"
FORGETFUL = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}\nA:{% endif %}"


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """The template engine is llama-cpp-python's, and importing that needs its library."""
    from conftest import library

    from kvcapsule_gguf import native

    native.load(library("patched"))


def template(source: str | None, adds_bos: bool = True) -> ChatTemplate:
    return ChatTemplate(source, "<s>", "</s>", adds_bos)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- template --------------------------------------------------------------------------------------------------------------------------------


def test_chatml_when_the_model_has_none() -> None:
    assert template(None).render([user("hi")], True) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_first_token_is_left_to_the_tokenizer() -> None:
    assert template("{{ bos_token }}" + VICUNA).render([user("hi")], True) == "USER: hi\nASSISTANT:"
    assert template("{{ bos_token }}" + VICUNA, adds_bos=False).render([user("hi")], True) == "<s>USER: hi\nASSISTANT:"


def test_templates_that_only_know_lists_of_parts() -> None:
    assert template(TYPED).render([user(MARKER + "what?")], True) == MARKER + "what?|"


@pytest.mark.parametrize("source, message", [("{% for %}", "cannot be read"), ("{{ raise_exception('no system role') }}", "refuses this conversation: no system role"), ("constant", "drops the message")])
def test_templates_that_do_not_work(source: str, message: str) -> None:
    with pytest.raises(KVCapsuleError, match=message):
        template(source).render([user("hi")], True)


def test_a_template_is_rendered_in_a_sandbox() -> None:
    with pytest.raises(KVCapsuleError):
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[-1]['content'] }}").render([user("hi")], True)


# --- what is new -----------------------------------------------------------------------------------------------------------------------------


def session(source: str) -> Session:
    new = Session.__new__(Session)
    new.template, new.state, new.messages, new.pictures = template(source), Contents(None), [], []
    return new


def turn(s: Session, question: str, answer: str, raw: str | None = None, n_pictures: int = 0) -> str | None:
    """One exchange; `raw` is what the model said when that is not what is kept as its answer. Returns what was evaluated."""
    prompt = s.template.render([*s.messages, user(question)], True)
    new = s._new_part(prompt, n_pictures)
    s.state.text = prompt + (answer if raw is None else raw)
    s.messages += [user(question), said(answer)]
    return new


def test_the_first_turn_is_the_whole_prompt() -> None:
    assert turn(session(VICUNA), MARKER + "what?", "red", n_pictures=1) == f"USER: {MARKER}what?\nASSISTANT:"


def test_later_turns_are_only_what_is_new() -> None:
    s = session(VICUNA)
    turn(s, MARKER + "what?", "red", raw=" red", n_pictures=1)
    assert turn(s, "and?", "blue", raw=" blue") == "</s>\nUSER: and?\nASSISTANT:"
    assert turn(s, f"{MARKER}this?", "green", raw=" green", n_pictures=1) == f"</s>\nUSER: {MARKER}this?\nASSISTANT:"


@pytest.mark.parametrize("answer, raw", [("red", " red\n\n"), ("red\n", " red\n"), ("one\ntwo", " one\ntwo ")])
def test_templates_that_trim_answers(answer: str, raw: str) -> None:
    s = session(TRIMMING)
    turn(s, "what?", answer, raw=raw)
    assert turn(s, "and?", "blue") == "</s>\nUSER: and?\nASSISTANT:"


def test_templates_that_leave_out_thoughts() -> None:
    s = session(VICUNA.replace("ASSISTANT: {{ m['content'] }}", "ASSISTANT: {{ m['content'].split('</think>')[-1] | trim }}"))
    turn(s, "what?", "<think>\nhm\n</think>\n\na red ball")
    assert turn(s, "and?", "blue") == "</s>\nUSER: and?\nASSISTANT:"


def test_an_empty_answer() -> None:
    s = session(TRIMMING)
    turn(s, "what?", "", raw="\n")
    assert turn(s, "and?", "blue") == "USER: and?\nASSISTANT:"


def test_a_template_that_rewrites_the_past_starts_again() -> None:
    s = session(FORGETFUL)
    turn(s, "what?", "red")
    assert turn(s, "and?", "blue") is None


def test_a_template_that_moves_pictures_starts_again() -> None:
    s = session(VICUNA)
    turn(s, "what?", "red")
    assert s._new_part(s.template.render([*s.messages, user("and?")], True), 1) is None


# --- break-even ------------------------------------------------------------------------------------------------------------------------------


def use(**changes: int) -> CacheUse:
    values = dict(vision_tokens=0, bytes_f16=0, bytes_now=0, bytes_allocated=0, bytes_scratch=1000, bytes_cell=10, slots=(0, 0), n_hot=0, n_hot_used=0)
    return CacheUse(**{**values, **changes})


def test_break_even_counts_the_hot_cells_of_one_picture_and_the_scratch() -> None:
    pictures = [ImageUse("a", tokens=100, moved=100, bytes_f16=1000, bytes_now=200)] * 2
    assert break_even(use(), pictures) == 3  # (100 * 10 + 1000) / 800
    assert break_even(use(), []) is None
    assert break_even(use(), [ImageUse("a", tokens=100, moved=100, bytes_f16=1000, bytes_now=1000)]) is None


def test_ratio() -> None:
    assert use(bytes_f16=1000, bytes_now=200).ratio == 0.8
    assert use().ratio == 0.0


def test_pictures_without_a_projector_are_refused() -> None:
    s = session(VICUNA)
    s.engine = SimpleNamespace(mtmd_ctx=None)
    with pytest.raises(KVCapsuleError, match="--mmproj"):
        s.ask("what?", [object()], print)


def test_a_question_that_is_asked_again_in_vain_stays_as_it_was() -> None:
    s = session(VICUNA)
    s.messages, s.pictures = [user(MARKER + "what?"), said("red"), user(MARKER * 2 + "and?"), said("blue")], ["a", "b", "c"]
    before = list(s.messages), list(s.pictures)
    with pytest.raises(KeyboardInterrupt), s.asked_again() as (question, pictures):
        assert (question, pictures, s.messages, s.pictures) == ("and?", ["b", "c"], before[0][:2], ["a"])
        raise KeyboardInterrupt
    assert (s.messages, s.pictures) == before
