"""A chat handler for llama_cpp.Llama that reads each picture once: what the cache holds already is found by its contents and kept."""

from __future__ import annotations

import ctypes
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_cpp import Llama, llama_chat_format
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, MTMDChatHandler

from .. import native
from ..chat.fill import Work, fill
from ..chat.prompt import Chunk, read_chunks
from ..chat.stats import ImageUse
from ..reuse.prefixes import DEFAULT_MIB, Prefixes
from ..runtime.errors import KVCapsuleError
from ..runtime.pictures import Budget, Picture, decode, new_bitmap, read
from .contents import LlamaContents, LlamaEngine
from .tools import choose_tool

_COMPLETION = inspect.signature(Llama.create_completion).parameters
# what goes from a request to create_completion(), with the defaults of the handler that this one replaces; the rest is for the chat template
SAMPLING = {name: parameter.default for name, parameter in inspect.signature(MTMDChatHandler.__call__).parameters.items() if name != "self" and name in _COMPLETION}


@dataclass
class PromptStats(Work):
    """Of the last prompt, in tokens (cells of the cache). images: every picture of the conversation, with its tokens, slots and bytes."""

    tokens_reused: int = 0
    images: list[ImageUse] = field(default_factory=list)


class KVCapsuleChatHandler(MTMDChatHandler):
    """Llama(..., chat_handler=KVCapsuleChatHandler(clip_model_path=...)). One handler for one Llama, and no other handler on that Llama.

    image_cache: a folder in which read pictures are kept for the next start, image_cache_mib: how large it may become."""

    def __init__(self, clip_model_path: str, verbose: bool = False, use_gpu: bool = True, *, image_cache: str | Path | None = None, image_cache_mib: int = DEFAULT_MIB,
                 capsule_path: Path | None = None) -> None:  # fmt: skip
        super().__init__(clip_model_path=str(clip_model_path), verbose=verbose, use_gpu=use_gpu)
        self._image_cache = Path(image_cache) if image_cache is not None else None
        self._image_cache_mib = image_cache_mib
        self._capsule_path = capsule_path
        self._contents: LlamaContents | None = None
        self._plain_text: bool | None = None  # of the model's chat template, once it is known
        self._request = 0
        self.stats = PromptStats()

    def __call__(self, *, llama: Llama, messages: list[Any], functions: Any = None, function_call: Any = None, tools: Any = None, tool_choice: Any = None,
                 response_format: Any = None, grammar: Any = None, logprobs: Any = None, top_logprobs: Any = None, max_tokens: int | None = None, stream: bool = False,
                 **kwargs: Any) -> Any:  # fmt: skip
        """As MTMDChatHandler does it. Raises ValueError for pictures and prompts that cannot be read or do not fit."""
        contents = self._open(llama)
        self._request += 1
        template = {name: value for name, value in kwargs.items() if name not in SAMPLING}
        prompt = self._render(llama, messages, functions=functions, function_call=function_call, tools=tools, tool_choice=tool_choice, **template)
        try:
            with self._chunks(prompt, self.get_image_urls(messages)) as (chunks, pictures):
                self._fill(contents, chunks, pictures)
        except KVCapsuleError as error:
            raise ValueError(str(error)) from None
        if response_format is not None and response_format["type"] == "json_object":
            grammar = llama_chat_format._grammar_for_response_format(response_format)
        tool, grammar = choose_tool(llama, functions, function_call, tools, tool_choice, grammar)
        sampling = {**SAMPLING, **{name: value for name, value in kwargs.items() if name in SAMPLING}}
        sampling |= {"grammar": grammar, "logprobs": top_logprobs if logprobs else None, "max_tokens": self._most_tokens(contents, max_tokens), "stream": stream}
        answer = llama.create_completion(prompt=llama.input_ids[: llama.n_tokens].tolist(), **sampling)
        if stream:
            answer = self._only_while_current(answer)
        if tool is not None:
            return llama_chat_format._convert_completion_to_chat_function(tool["function"]["name"], answer, stream)
        return llama_chat_format._convert_completion_to_chat(answer, stream=stream)

    def load_image(self, image_url: str) -> bytes:
        """data: and http(s) URLs; nothing else, since they come with messages of other people. Raises ValueError."""
        if not image_url[:8].lower().startswith(("data:", "http://", "https://")):
            raise ValueError("a picture must be a data: or http(s) URL")
        return read(image_url)

    def _open(self, llama: Llama) -> LlamaContents:
        self._init_mtmd_context(llama)
        if self._contents is None or self._contents.engine.owner is not llama:
            path = self._capsule_path
            if path is None and native.is_attached(llama.ctx):
                path = native.environment_capsule()
            engine = LlamaEngine(llama, self.mtmd_ctx, Path(self.clip_model_path), path)
            llama.reset()
            self._contents, self._plain_text = LlamaContents(engine), None
            if self._image_cache is not None:
                try:
                    engine.prefixes = Prefixes(self._image_cache, self._image_cache_mib, engine.binding, engine.llama, warnings.warn)
                except OSError as error:
                    raise ValueError(f"image_cache {self._image_cache}: {error.strerror or error}") from None
        return self._contents

    def _render(self, llama: Llama, messages: list[Any], **values: Any) -> str:
        bos, eos = (self._decode_token_piece(llama.detokenize([token])) for token in (llama.token_bos(), llama.token_eos()))
        formatter = Jinja2ChatFormatter(self._get_chat_template(llama), eos_token=eos, bos_token=bos)
        marker = self._mtmd_cpp.mtmd_default_marker().decode()
        messages = self._get_template_messages([_without(message, marker) for message in messages], marker)
        if self._plain_text is None:
            self._plain_text = _knows_only_text(formatter)
        return formatter(messages=[_as_text(message) for message in messages] if self._plain_text else messages, **values).prompt

    @contextmanager
    def _chunks(self, prompt: str, urls: list[str]) -> Iterator[tuple[list[Chunk], list[Picture]]]:
        mtmd = self._mtmd_cpp
        bitmaps: list[Any] = []
        pictures, budget = list[Picture](), Budget()
        found = mtmd.mtmd_input_chunks_init()
        try:
            for index, url in enumerate(urls):
                pictures.append(decode(self.load_image(url), budget, f"image {index + 1}"))
                bitmaps.append(new_bitmap(mtmd, pictures[-1].rgb))
                mtmd.mtmd_bitmap_set_id(bitmaps[-1], str(index).encode())
            text = prompt.encode("utf-8", "replace")
            request = mtmd.mtmd_input_text(text=text, text_len=len(text), add_special=True, parse_special=True)
            array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            if status := mtmd.mtmd_tokenize(self.mtmd_ctx, found, ctypes.byref(request), array, len(bitmaps)):
                raise ValueError(f"the prompt and its {len(bitmaps)} pictures cannot be prepared for the model (status {status})")
            handles = [mtmd.mtmd_input_chunks_get(found, i) for i in range(mtmd.mtmd_input_chunks_size(found))]
            yield read_chunks(mtmd, handles, [picture.digest for picture in pictures]), pictures
        finally:
            mtmd.mtmd_input_chunks_free(found)
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)

    def _fill(self, contents: LlamaContents, chunks: list[Chunk], pictures: list[Picture]) -> None:
        n_ctx, needed = contents.engine.n_ctx, sum(chunk.n_tokens for chunk in chunks)
        if needed >= n_ctx:
            # these words are what llama_cpp.server answers 400 to
            raise ValueError(f"Requested tokens ({needed}) exceed context window of {n_ctx}")
        contents.sync()
        self.stats = PromptStats()
        fill(contents, chunks, pictures, self.stats, append=False, prefixes=contents.engine.prefixes)
        self.stats.tokens_reused = needed - self.stats.tokens_evaluated
        self.stats.images = list(contents.images)

    def _most_tokens(self, contents: LlamaContents, wanted: int | None) -> int:
        """Llama counts positions; here it is cells, and what fits into the hot cache."""
        room = contents.engine.n_ctx - contents.n_cells
        if contents.engine.capsule:
            stats = native.stats(contents.engine.ctx)
            room = min(room, stats.n_hot - stats.n_hot_used)
        return max(1, room if wanted is None or wanted <= 0 else min(room, wanted))

    def _only_while_current(self, chunks: Iterator[Any]) -> Iterator[Any]:
        request = self._request
        for chunk in chunks:
            yield chunk
            if self._request != request:
                raise RuntimeError("this Llama has answered another request since: a stream must be finished or closed first")


def _knows_only_text(formatter: Jinja2ChatFormatter) -> bool:
    """Whether a template wants the content of a message as text, not as a list of parts."""
    try:
        text = formatter(messages=[{"role": "user", "content": [{"type": "text", "text": "probe"}]}]).prompt
    except Exception:
        return True
    return "'probe'" in text or "probe" not in text


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": "".join(part.get("text") or "" for part in content)} if isinstance(content, list) else message


def _without(message: dict[str, Any], marker: str) -> dict[str, Any]:
    """A marker in somebody's words must not stand for a picture."""

    def clean(value: Any) -> Any:
        return value.replace(marker, marker.strip("<>")) if isinstance(value, str) else value

    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [{**part, "text": clean(part["text"])} if isinstance(part, dict) and part.get("type") == "text" else part for part in content]}
    return {**message, "content": clean(content)}
