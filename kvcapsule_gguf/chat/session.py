"""A conversation in the cache: every turn evaluates only what is new."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..runtime import interrupts
from ..runtime.errors import ContextFull, KVCapsuleError
from ..runtime.marker import MARKER
from ..runtime.pictures import Picture
from .args import Options
from .contents import Contents
from .engine import Engine
from .fill import Lost, Work, fill
from .prompt import chunks
from .sampling import chain
from .template import ChatTemplate, Message


@dataclass
class Turn(Work):
    """One question and its answer."""

    answer: str = ""
    finish_reason: str = "stop"  # stop, length (-n), context (full) or interrupted
    generated_tokens: int = 0
    tokens_reused: int = 0  # cells of the prompt that were not evaluated
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return self.tokens_evaluated


class Session:
    def __init__(self, engine: Engine, options: Options) -> None:
        llama = engine.llama
        self.engine = engine
        self.options = options
        own = llama.llama_model_chat_template(engine.model, None)
        source = options.chat_template or (own.decode("utf-8", "replace") if own else None)
        bos, eos = (self._special(token(engine.vocab)) for token in (llama.llama_vocab_bos, llama.llama_vocab_eos))
        adds_bos = llama.llama_vocab_get_add_bos(engine.vocab)
        self.template = ChatTemplate(source, bos, eos, adds_bos)
        self.state = Contents(engine)
        self.clear()

    def clear(self) -> None:
        """Forgets the conversation; the system prompt stays."""
        with interrupts.deferred():
            self.state.clear()
            self.messages: list[Message] = [{"role": "system", "content": self.options.system}] if self.options.system else []
            self.pictures: list[Picture] = []
            self.undone = False  # the cache holds more than the conversation

    @property
    def taken_back(self) -> int | None:
        """How many of the last pictures in the cache are in the conversation no more, since /undo took them back; None: nothing was taken back."""
        return len(self.state.images) - len(self.pictures) if self.undone else None

    def undo(self) -> tuple[str, list[Picture]] | None:
        """Takes back the last question, its pictures and its answer; returns question and pictures, None if there is none. The part before stays in the cache."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        question = self.messages[asked[-1]]["content"]
        first = len(self.pictures) - question.count(MARKER)
        with interrupts.deferred():
            pictures, self.pictures = self.pictures[first:], self.pictures[:first]
            self.messages = self.messages[: asked[-1]]
            self.state.text = ""
            self.undone = True
        return question.replace(MARKER, ""), pictures

    @contextmanager
    def asked_again(self) -> Iterator[tuple[str, list[Picture]]]:
        """The last question and its pictures, taken back; an exception inside puts them and the answer back. Raises KVCapsuleError if there is none."""
        before = self.messages, self.pictures
        if (last := self.undo()) is None:
            raise KVCapsuleError("there is no question yet")
        try:
            yield last
        except BaseException:
            self.messages, self.pictures = before
            raise

    def ask(self, question: str, pictures: list[Picture], on_text: Callable[[str], None], keep_part: bool = False) -> Turn:
        """Streams the answer to `on_text`. Raises KVCapsuleError and KeyboardInterrupt; the conversation is then as it was before. keep_part: once the answer
        has begun, KeyboardInterrupt is not raised: it ends the answer, and what was said of it stays."""
        if pictures and self.engine.mtmd_ctx is None:
            raise KVCapsuleError("pictures need a vision projector: give it with --mmproj, or put mmproj*.gguf beside the model")
        message = {"role": "user", "content": MARKER * len(pictures) + question}
        prompt = self.template.render([*self.messages, message], True)
        try:
            turn = self._fill(prompt, pictures)
            self._generate(turn, on_text, keep_part)
        except BaseException:
            if self.state.text.startswith(prompt):  # else nothing of it is left in the cache
                self.state.settle()
            raise
        with interrupts.deferred():
            self.pictures += pictures
            self.messages += [message, {"role": "assistant", "content": turn.answer}]
        return turn

    def _special(self, token: int) -> str:
        return self.engine.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _new_part(self, prompt: str, n_pictures: int) -> str | None:
        """What has to be added to the cache so that it holds `prompt`; None if that cannot be done by adding."""
        if not self.state.text:
            # nothing is known but the items in the cache: what they have in common with the prompt decides
            return None if self.pictures or self.state.items else prompt
        if prompt.startswith(self.state.text):
            new = prompt[len(self.state.text) :]
        else:
            # templates trim answers, or leave out their thoughts: continue after the end of the last answer as it stands in the prompt
            past = self.template.render(self.messages, False)
            if not prompt.startswith(past):
                return None
            end = self.messages[-1]["content"].strip().rpartition("\n")[2]
            at = past.rfind(end) if end else -1
            new = prompt[at + len(end) if at >= 0 else len(past) :]
        return new if new.count(MARKER) == n_pictures else None

    def _fill(self, prompt: str, pictures: list[Picture]) -> Turn:
        """Makes the cache hold `prompt`; `pictures` are those of the new question."""
        state, turn = self.state, Turn()
        start = time.monotonic()
        new = self._new_part(prompt, len(pictures))
        n_items, text = len(state.items), state.text
        try:
            if new is not None:
                try:
                    with chunks(self.engine, new, pictures, first=not state.items) as parts:
                        fill(state, parts, pictures, turn, append=True, prefixes=self.engine.prefixes)
                except Lost:
                    new = None
            if new is None:
                # the template or the user changed what was said before: what both have in common stays
                shown = [*self.pictures, *pictures]
                with chunks(self.engine, prompt, shown, first=True) as parts:
                    fill(state, parts, shown, turn, append=False, prefixes=self.engine.prefixes)
        except BaseException:
            with interrupts.deferred():
                if new is not None and state.rewind(n_items) == n_items:
                    state.text = text
                else:
                    state.rewind(len(state.items))
            raise
        state.text = prompt
        self.undone = False
        turn.tokens_reused = state.n_cells - turn.tokens_evaluated
        turn.prefill_s = time.monotonic() - start - turn.compress_s
        return turn

    def _generate(self, turn: Turn, on_text: Callable[[str], None], keep_part: bool) -> None:
        engine, llama = self.engine, self.engine.llama
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start = time.monotonic()
        raw: list[str] = []
        answer: list[str] = []

        def emit(text: str) -> None:
            raw.append(text)
            # tokenizers of the SentencePiece kind start an answer with a space
            text = text if answer else text.lstrip()
            if text:
                answer.append(text)
                on_text(text)

        try:
            with chain(engine, self.options) as sampler:
                while True:
                    if 0 <= self.options.n_predict <= turn.generated_tokens:
                        turn.finish_reason = "length"
                        break
                    token = llama.llama_sampler_sample(sampler, engine.ctx, -1)
                    if llama.llama_vocab_is_eog(engine.vocab, token):
                        break
                    if self.state.n_cells >= engine.n_ctx:
                        turn.finish_reason = "context"
                        break
                    turn.generated_tokens += 1
                    emit(decoder.decode(engine.piece(token)))
                    self.state.add_text([token], last=True)
            self.state.text += "".join(raw)
        except ContextFull:
            turn.finish_reason = "context"
            self.state.settle()
        except KeyboardInterrupt:
            if not keep_part:
                raise
            turn.finish_reason = "interrupted"
            self.state.settle()
        if rest := decoder.decode(b"", final=True):
            emit(rest)
        turn.decode_s = time.monotonic() - start
        turn.answer = "".join(answer)
