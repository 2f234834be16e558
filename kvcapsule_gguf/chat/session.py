"""A conversation in the cache: every turn evaluates only what is new."""

from __future__ import annotations

import codecs
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import native
from .args import Options
from .engine import Engine
from .errors import ChatError, ContextFull
from .images import Picture
from .prompt import Chunk, chunks
from .sampling import chain
from .stats import ImageUse, plain_bytes
from .template import ChatTemplate, Message

SEQ = 0


@dataclass
class Turn:
    """One question and its answer. prompt_tokens counts what was evaluated for it, pictures included."""

    answer: str = ""
    finish_reason: str = "stop"  # stop, length (-n), context (full) or interrupted
    prompt_tokens: int = 0
    vision_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    compress_s: float = 0.0
    decode_s: float = 0.0


@dataclass
class State:
    """What is in the cache. Positions and cells differ: an M-RoPE picture of n cells takes max(rows, columns) positions."""

    n_past: int = 0
    n_cells: int = 0
    text: str = ""
    images: list[ImageUse] = field(default_factory=list)


class Session:
    def __init__(self, engine: Engine, options: Options) -> None:
        llama = engine.llama
        self.engine = engine
        self.options = options
        source = llama.llama_model_chat_template(engine.model, None)
        bos, eos = (self._special(token(engine.vocab)) for token in (llama.llama_vocab_bos, llama.llama_vocab_eos))
        adds_bos = llama.llama_vocab_get_add_bos(engine.vocab)
        self.template = ChatTemplate(source.decode("utf-8", "replace") if source else None, bos, eos, adds_bos)
        self.marker = engine.native.mtmd.mtmd_default_marker().decode() if engine.mtmd_ctx else "<__media__>"
        self.clear()

    def clear(self) -> None:
        """Forgets the conversation; the system prompt stays."""
        self.engine.llama.llama_memory_clear(self.engine.memory, True)
        self.state = State()
        self.messages: list[Message] = [{"role": "system", "content": self._clean(self.options.system)}] if self.options.system else []
        self.pictures: list[Picture] = []

    def ask(self, question: str, pictures: list[Picture], on_text: Callable[[str], None]) -> Turn:
        """Streams the answer to `on_text`. Raises ChatError; the conversation is then as it was before."""
        if pictures and self.engine.mtmd_ctx is None:
            raise ChatError("pictures need a vision projector: give it with --mmproj, or put mmproj*.gguf beside the model")
        message = {"role": "user", "content": self.marker * len(pictures) + self._clean(question)}
        prompt = self.template.render([*self.messages, message], True)
        new = self._new_part(prompt, len(pictures))
        if new is None:
            # the template rewrites what was said before: from the start, with every picture
            self._rewind(State())
            new, shown = prompt, [*self.pictures, *pictures]
        else:
            shown = pictures
        before = State(self.state.n_past, self.state.n_cells, self.state.text, list(self.state.images))
        turn = Turn()
        try:
            self._evaluate(new, shown, turn)
        except BaseException:
            self._rewind(before)
            raise
        self.state.text = prompt
        self.messages.append(message)
        self.pictures += pictures
        try:
            self._generate(turn, on_text)
        finally:
            self.messages.append({"role": "assistant", "content": turn.answer})
        return turn

    def _special(self, token: int) -> str:
        return self.engine.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _clean(self, text: str) -> str:
        """A marker in the user's own words must not stand for a picture."""
        return text.replace(self.marker, self.marker.strip("<>"))

    def _new_part(self, prompt: str, n_pictures: int) -> str | None:
        """What has to be added to the cache so that it holds `prompt`; None if that cannot be done by adding."""
        if not self.state.text:
            # also after an error that emptied the cache: then the earlier pictures have to be read again
            return None if self.pictures else prompt
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
        return new if new.count(self.marker) == n_pictures else None

    def _evaluate(self, text: str, pictures: list[Picture], turn: Turn) -> None:
        start = time.monotonic()
        with chunks(self.engine, text, pictures, first=self.state.n_past == 0) as parts:
            self._check_room(parts, pictures)
            base = len(self.state.images)
            self.state.images += [ImageUse(picture.name) for picture in pictures]
            for index, part in enumerate(parts):
                if part.tokens is not None:
                    self._decode_text(part.tokens, last=index == len(parts) - 1)
                else:
                    turn.compress_s += self._decode_image(part, self.state.images[base + part.picture])
                    turn.vision_tokens += part.n_tokens
                turn.prompt_tokens += part.n_tokens
        turn.prefill_s = time.monotonic() - start - turn.compress_s

    def _check_room(self, parts: list[Chunk], pictures: list[Picture]) -> None:
        """Refuses what cannot fit before anything is computed. Raises ContextFull."""
        n_ctx = self.engine.n_ctx
        if not parts or parts[-1].tokens is None:
            raise ChatError("the model's chat template puts nothing after the picture, so there is nothing to answer")
        needed = sum(part.n_tokens for part in parts)
        if self.state.n_cells + needed >= n_ctx:
            raise ContextFull(f"the context is full: {self.state.n_cells} of {n_ctx} tokens are used and {needed} more are needed (-c sets its size, /clear empties it)")
        n_hot, used = n_ctx, 0
        if self.engine.capsule is not None:
            stats = native.stats(self.engine.ctx)
            n_hot, used = stats.n_hot, stats.n_hot_used
        for part in parts:
            name = "the text" if part.tokens is not None else pictures[part.picture].name
            if part.n_tokens > n_hot - used:
                held = f", {used} of them taken by text" if used else ""
                hint = ", or use a smaller picture" if part.tokens is None else ""
                raise ContextFull(f"{name} needs {part.n_tokens} cells of the hot cache, which has {n_hot}{held}: raise --hot{hint}")
            if part.tokens is not None:
                used += part.n_tokens
                continue
            mtmd, n_ubatch = self.engine.native.mtmd, self.engine.llama.llama_n_ubatch(self.engine.ctx)
            if part.n_tokens > n_ubatch and mtmd.mtmd_decode_use_non_causal(self.engine.mtmd_ctx, part.handle):
                raise ChatError(f"{name} has {part.n_tokens} tokens, and this model needs them in one batch of {n_ubatch}: raise -ub (and -b)")

    def _decode_text(self, tokens: list[int], last: bool) -> None:
        """last: the logits of the last token are wanted."""
        llama, n_batch = self.engine.llama, self.engine.llama.llama_n_batch(self.engine.ctx)
        batch = llama.llama_batch_init(min(len(tokens), n_batch), 0, 1)
        try:
            for start in range(0, len(tokens), n_batch):
                piece = tokens[start : start + n_batch]
                batch.n_tokens = len(piece)
                for i, token in enumerate(piece):
                    batch.token[i] = token
                    batch.pos[i] = self.state.n_past + i
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = SEQ
                    batch.logits[i] = last and start + i == len(tokens) - 1
                self._check(llama.llama_decode(self.engine.ctx, batch))
                self.state.n_past += len(piece)
                self.state.n_cells += len(piece)
        finally:
            llama.llama_batch_free(batch)

    def _decode_image(self, part: Chunk, image: ImageUse) -> float:
        """Encodes, decodes and compresses a picture; returns the seconds of the last."""
        engine = self.engine
        p0, after = self.state.n_past, engine.llama.llama_pos(self.state.n_past)
        n_batch = engine.llama.llama_n_batch(engine.ctx)
        self._check(engine.native.mtmd.mtmd_helper_eval_chunk_single(engine.mtmd_ctx, engine.ctx, part.handle, p0, SEQ, n_batch, False, ctypes.byref(after)))
        self.state.n_past = after.value
        self.state.n_cells += part.n_tokens
        image.tokens += part.n_tokens
        if engine.capsule is None:
            f16, cell = plain_bytes(engine)
            image.bytes_f16 += part.n_tokens * f16
            image.bytes_now += part.n_tokens * cell
            return 0.0
        start = time.monotonic()
        before = native.stats(engine.ctx)
        # automatic mode would do it with the next text; done here, it can be timed and counted per picture
        moved = native.compress(engine.ctx, SEQ, p0, self.state.n_past)
        now = native.stats(engine.ctx)
        slots = tuple(b - a for a, b in zip(before.n_slots, now.n_slots))
        image.moved += moved
        image.slots = (image.slots[0] + slots[0], image.slots[1] + slots[1])
        image.bytes_f16 += part.n_tokens * now.bytes_f16_token
        image.bytes_now += now.bytes_slots - before.bytes_slots + (part.n_tokens - moved) * now.bytes_hot // max(now.n_hot, 1)
        return time.monotonic() - start

    def _generate(self, turn: Turn, on_text: Callable[[str], None]) -> None:
        engine, llama = self.engine, self.engine.llama
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start = time.monotonic()
        answer: list[str] = []

        def emit(text: str) -> None:
            self.state.text += text
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
                    self._decode_text([token], last=True)
        except ContextFull as full:
            turn.finish_reason = "context"
            engine.say(str(full))
        except KeyboardInterrupt:
            turn.finish_reason = "interrupted"
            # the last token may be in the cache already, uncounted
            llama.llama_memory_seq_rm(engine.memory, SEQ, self.state.n_past, -1)
        emit(decoder.decode(b"", final=True))
        turn.decode_s = time.monotonic() - start
        turn.answer = "".join(answer)

    def _check(self, status: int) -> None:
        if status == 0:
            self.engine.log.take()
            return
        # no room is a warning for the library, which then goes on without the batch
        reason = self.engine.log.take(about="cache is full" if status == 1 else "")
        if status == 1:
            raise ContextFull(reason or f"the context is full ({self.state.n_cells} of {self.engine.n_ctx} tokens are used)")
        raise ChatError(f"the model could not be evaluated: {reason or f'status {status}'}")

    def _rewind(self, state: State) -> None:
        """Back to an earlier state of the cache, or to an empty one when the model cannot go back."""
        llama, memory = self.engine.llama, self.engine.memory
        if state.n_past == 0 or not llama.llama_memory_seq_rm(memory, SEQ, state.n_past, -1):
            llama.llama_memory_clear(memory, True)
            state = State()
        self.state = state
