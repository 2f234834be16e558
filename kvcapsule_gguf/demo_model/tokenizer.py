"""The vocabulary, and llama.cpp's SentencePiece (`llama`) tokenization of it in a few lines.

Every piece longer than one letter is a beginning of a known word, with or without a leading space, so that merging
walks along the words; whatever is unknown falls apart into letters and bytes.
"""

from __future__ import annotations

from functools import cached_property

from ..scenes import COLOURS, SHAPES
from ..scenes.questions import NUMBERS

SPACE = "\u2581"
UNKNOWN, BOS, EOS = 0, 1, 2
_STARTERS = "USER: ASSISTANT: What Where How Which Read List".split()
_WORDS = """a and are at colour digit digits does do first has image images in is left center right top middle bottom
many more nothing object objects of or same say scene second see the there where word words you crosses Answer""".split()
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>")  # libmtmd writes them around the pictures of Qwen2-VL
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'\"-()"


class Tokenizer:
    """Pieces with scores and types as a GGUF wants them; encode and decode as llama.cpp does.

    `around_image`: control tokens that stand around a picture, last in the vocabulary.
    """

    def __init__(self, around_image: tuple[str, ...] = ()):
        self.around_image = around_image

    @cached_property
    def pieces(self) -> list[str]:
        words = [*_STARTERS, *_WORDS, *COLOURS, *SHAPES, *(f"{s}s" for s in SHAPES), *NUMBERS]
        found = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), SPACE, *_CHARACTERS])
        for letter in _CHARACTERS[:62]:
            found.setdefault(SPACE + letter)
        for word in words:
            for end in range(1, len(word) + 1):
                found.setdefault(SPACE + word[:end])
                if word in _STARTERS:
                    found.setdefault(word[:end])
        return [*found, *self.around_image]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @property
    def scores(self) -> list[float]:
        return [-float(i) for i in range(len(self.pieces))]

    @property
    def types(self) -> list[int]:
        """GGUF token types: 2 unknown, 3 control, 6 byte, 1 normal."""
        extra = len(self.around_image)
        return [2, 3, 3] + [6] * 256 + [1] * (len(self.pieces) - 259 - extra) + [3] * extra

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Tokens of plain text; `prefix` puts the leading space that llama.cpp adds to each piece of text."""
        symbols = list((" " + text if prefix else text).replace(" ", SPACE))
        while True:
            merges = [(self.ids[pair], i) for i, pair in enumerate(map("".join, zip(symbols, symbols[1:])))
                      if pair in self.ids]
            if not merges:
                break
            at = min(merges)[1]  # lowest id is highest score; leftmost on ties
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        out: list[int] = []
        for symbol in symbols:
            known = self.ids.get(symbol)
            out += [known] if known is not None else [3 + b for b in symbol.encode()]
        return out

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, control tokens left out."""
        raw = b""
        for token in tokens:
            if 3 <= token < 259:
                raw += bytes([token - 3])
            elif 259 <= token < len(self.pieces) - len(self.around_image):
                raw += self.pieces[token].replace(SPACE, " ").encode()
        return raw.decode(errors="replace")


# What llama.cpp's built-in `vicuna` template writes too.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + '</s>\\n' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class Prompts:
    """Tokens around the image, as the template and mtmd produce them (cached: few different texts occur)."""

    def __init__(self, tokenizer: Tokenizer | None = None):
        self.tokenizer = tokenizer or Tokenizer()
        self._cache: dict[tuple[str, bool], list[int]] = {}

    def _encode(self, text: str, prefix: bool) -> list[int]:
        key = (text, prefix)
        if key not in self._cache:
            self._cache[key] = self.tokenizer.encode(text, prefix)
        return self._cache[key]

    def before_image(self) -> list[int]:
        """Beginning of a conversation, up to the image (or what stands around it)."""
        return [BOS, *self._encode("USER: ", True)]

    def around_image(self) -> tuple[list[int], list[int]]:
        """What stands right before and right after each image."""
        ids = [self.tokenizer.ids[piece] for piece in self.tokenizer.around_image]
        return ids[:1], ids[1:]

    def question(self, prompt: str, separator: str = "") -> list[int]:
        """The rest of the message that holds the image, up to the answer."""
        return self._encode(f"{separator}{prompt}\nASSISTANT:", True)

    def answer(self, answer: str) -> list[int]:
        """The answer and its end."""
        return [*self._encode(f" {answer}", False), EOS]

    def later_question(self, prompt: str) -> list[int]:
        """A question in a later turn, after the end of an answer."""
        return self._encode(f"\nUSER: {prompt}\nASSISTANT:", True)
