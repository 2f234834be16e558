"""The text around a picture, as tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..chat.template import ChatTemplate
from ..runtime.marker import MARKER
from .vlm import Vlm


@dataclass(frozen=True)
class Forced:
    """What follows the picture: the rest of the question, and the answer up to its end."""

    tokens: list[int]
    n_answer: int  # the last so many are the answer and the token that ends it


class Prompts:
    """Renders question and answer with the model's own template."""

    def __init__(self, vlm: Vlm) -> None:
        self.vlm = vlm
        adds_bos = bool(vlm.llama.llama_vocab_get_add_bos(vlm.vocab))
        self.template = ChatTemplate(vlm.metadata("tokenizer.chat_template"), vlm.piece(vlm.bos), vlm.piece(vlm.eos), adds_bos)

    def before(self) -> str:
        """Up to the picture."""
        return self._split("x")[0]

    def question(self, prompt: str) -> list[int]:
        """The tokens after the picture, up to the answer."""
        return self.vlm.tokenize(self._split(prompt)[1])

    def forced(self, prompt: str, answer: str) -> Forced:
        """The tokens after the picture, with the given answer."""
        after = self._split(prompt)[1]
        asked = [{"role": "user", "content": f"{MARKER}{prompt}"}]
        whole = self.template.render([*asked, {"role": "assistant", "content": answer}], generate=False).split(MARKER, 1)[1]
        if not whole.startswith(after):  # a template that treats past answers differently
            whole = f"{after}{answer}"
        tokens = self.vlm.tokenize(whole)
        start = self._common(tokens, self.vlm.tokenize(after))
        end = next((i for i in range(start, len(tokens)) if self.vlm.ends(tokens[i])), None)
        tokens = tokens[:end + 1] if end is not None else [*tokens, self.vlm.eos]
        return Forced(tokens, len(tokens) - start)

    def _split(self, prompt: str) -> tuple[str, str]:
        text = self.template.render([{"role": "user", "content": f"{MARKER}{prompt}"}], generate=True)
        before, after = text.split(MARKER, 1)
        return before, after

    @staticmethod
    def _common(a: list[int], b: list[int]) -> int:
        n = 0
        while n < min(len(a), len(b)) and a[n] == b[n]:
            n += 1
        return n
