"""A chat handler for llama_cpp.Llama that reads each picture once: what the cache holds already is found by its contents and kept."""

from __future__ import annotations

import gc
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_cpp import Llama, llama_chat_format
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, MTMDChatHandler

from .. import native
from ..chat.fill import Work, fill
from ..chat.prompt import Chunk, chunks
from ..chat.stats import ImageUse
from ..chat.template import CHATML
from ..format.projector import check_projector, has_m_rope
from ..reuse.prefixes import DEFAULT_MIB, Prefixes
from ..runtime import interrupts
from ..runtime.errors import KVCapsuleError
from ..runtime.marker import MARKER
from ..runtime.pictures import Budget, Picture, decode, read
from .alone import Alone
from .contents import LlamaContents, LlamaEngine
from .forced import Form, answer_form
from .messages import read_messages
from .quiet import reasons, say

_COMPLETION = inspect.signature(Llama.create_completion).parameters
# what goes from a request to create_completion(), with the defaults of the handler that this one replaces; the rest is for the chat template
SAMPLING = {name: parameter.default for name, parameter in inspect.signature(MTMDChatHandler.__call__).parameters.items() if name != "self" and name in _COMPLETION}


@dataclass
class PromptStats(Work):
    """Of the last prompt, in tokens (cells of the cache). images: every picture of the conversation, with its tokens, slots and bytes."""

    tokens_reused: int = 0
    images: list[ImageUse] = field(default_factory=list)


class KVCapsuleChatHandler(MTMDChatHandler):
    """Llama(..., chat_handler=KVCapsuleChatHandler(clip_model_path=...)). One handler for one Llama, and no other handler on that Llama. Without a
    projector (None) it answers text only.

    image_cache: a folder in which read pictures are kept for the next start, image_cache_mib: how large it may become."""

    def __init__(self, clip_model_path: str | None, verbose: bool = False, use_gpu: bool = True, *, image_cache: str | Path | None = None,
                 image_cache_mib: int = DEFAULT_MIB, capsule_path: Path | None = None) -> None:  # fmt: skip
        if clip_model_path is not None:
            super().__init__(clip_model_path=str(clip_model_path), verbose=verbose, use_gpu=use_gpu)
        self._mmproj = Path(clip_model_path) if clip_model_path is not None else None
        self._image_cache = Path(image_cache) if image_cache is not None else None
        self._image_cache_mib = image_cache_mib
        self._capsule_path = capsule_path
        self._contents: LlamaContents | None = None
        self._forms: dict[tuple[str, type], bool] = {}  # what the model's chat template takes, once it is known
        self._alone = Alone()  # for a plain Llama, of which nothing else is guarded
        self.mtmd_ctx: Any = None
        self.stats = PromptStats()

    def __call__(self, **request: Any) -> Any:
        """As MTMDChatHandler does it. Raises ValueError for requests that cannot be understood, and for pictures and prompts that cannot be read or do not fit;
        RuntimeError while another thread is being answered."""
        return getattr(request.get("llama"), "_alone", self._alone).run(lambda: self._answer(**request))

    def _answer(self, *, llama: Llama, messages: list[Any], functions: Any = None, function_call: Any = None, tools: Any = None, tool_choice: Any = None,
                 response_format: Any = None, grammar: Any = None, logprobs: Any = None, top_logprobs: Any = None, max_tokens: int | None = None, stream: bool = False,
                 **kwargs: Any) -> Any:  # fmt: skip
        contents = self._open(llama)
        form = answer_form(llama, functions=functions, function_call=function_call, tools=tools, tool_choice=tool_choice, response_format=response_format, grammar=grammar)
        known, urls = read_messages(messages, MARKER)
        if urls and self.mtmd_ctx is None:
            raise ValueError("pictures need a vision projector: give it as mmproj, or put mmproj*.gguf beside the model")
        template = {name: value for name, value in kwargs.items() if name not in SAMPLING}
        shown = functions if form.shown else None
        prompt = self._render(llama, known, functions=shown, function_call=function_call, tools=form.shown, tool_choice=tool_choice, **template)
        if prompt.count(MARKER) != len(urls):
            raise ValueError("the model's chat template does not show the pictures where these messages have them: put them into messages of the role user")
        try:
            budget = Budget()
            pictures = [decode(self.load_image(url), budget, f"image {index + 1}") for index, url in enumerate(urls)]
            for picture in pictures:
                if picture.warning:
                    say(picture.warning)
            with chunks(contents.engine, prompt, pictures, first=True) as parts:  # type: ignore[arg-type]
                self._fill(contents, parts, pictures)
        except KVCapsuleError as error:
            raise ValueError(str(error)) from None
        sampling = {**SAMPLING, **{name: value for name, value in kwargs.items() if name in SAMPLING}}
        sampling |= {"grammar": form.grammar, "logprobs": top_logprobs if logprobs else None, "max_tokens": self._most_tokens(contents, max_tokens)}
        # the name of one of several tools is known at the end
        sampling["stream"] = stream and len(form.tools) <= 1
        n_prompt = contents.n_cells
        with interrupts.Interrupts(guest=True):
            answer = llama.create_completion(prompt=llama.input_ids[: llama.n_tokens].tolist(), **sampling)
        if not sampling["stream"]:
            # Llama counts positions, of which an M-RoPE picture has few
            assert isinstance(answer, dict)
            usage = answer["usage"]
            usage |= {"prompt_tokens": n_prompt, "total_tokens": n_prompt + usage["completion_tokens"]}
        return _chat_answer(answer, form, stream)

    def load_image(self, image_url: str) -> bytes:
        """data: and http(s) URLs; nothing else, since they come with messages of other people. Raises ValueError."""
        if not image_url[:8].lower().startswith(("data:", "http://", "https://")):
            raise ValueError("a picture must be a data: or http(s) URL")
        return read(image_url)

    def _open(self, llama: Llama) -> LlamaContents:
        if llama._ctx.ctx is None:
            raise ValueError("this Llama is closed")
        if self._contents is not None and self._contents.engine.is_of(llama):
            return self._contents
        if self.mtmd_ctx is not None:
            raise ValueError("a KVCapsuleChatHandler is for one Llama: make another one for this Llama")
        self._init_mtmd_context(llama)
        path = self._capsule_path
        if path is None and native.is_attached(llama.ctx):
            path = native.environment_capsule()
        engine = LlamaEngine(llama, self.mtmd_ctx, self._mmproj, path)
        interrupts.stoppable_context(engine.llama, llama.ctx)
        llama.reset()
        self._contents, self._forms = LlamaContents(engine, llama), {}
        if self._image_cache is not None and self._mmproj is not None:
            try:
                engine.prefixes = Prefixes(self._image_cache, self._image_cache_mib, engine.binding(llama), engine.llama, say)
            except OSError as error:
                raise ValueError(f"image_cache {self._image_cache}: {error.strerror or error}") from None
        return self._contents

    def _init_mtmd_context(self, llama_model: Llama) -> None:
        """As MTMDChatHandler does it, but for the marker, and without a redirection of the process's stdout and stderr."""
        self.verbose = llama_model.verbose
        llama_model._stack.callback(self._close)
        if self._mmproj is None or self.mtmd_ctx is not None:
            return
        libraries = native.load()
        self._free = libraries.mtmd.mtmd_free  # when the process ends, Python may empty the module before the Llama goes
        try:
            check_projector(self._mmproj, has_m_rope(libraries.llama, llama_model.model))
        except KVCapsuleError as error:
            raise ValueError(str(error)) from None
        params = libraries.mtmd.mtmd_context_params_default()
        params.use_gpu = self.use_gpu
        params.print_timings = self.verbose
        params.n_threads = llama_model.n_threads
        params.media_marker = MARKER.encode()
        with_flash_attention = llama_model.context_params.flash_attn_type == libraries.llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.flash_attn_type = libraries.llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if with_flash_attention else libraries.llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with reasons() as said:
            self.mtmd_ctx = libraries.mtmd.mtmd_init_from_file(str(self._mmproj).encode(), llama_model.model, interrupts.stoppable(params))
            if not self.mtmd_ctx:
                raise ValueError(f"{self._mmproj} cannot be used with {Path(llama_model.model_path).name}: {said.take() or 'unknown reason (verbose=True shows the log)'}")
        if not libraries.mtmd.mtmd_support_vision(self.mtmd_ctx):
            raise ValueError(f"{self._mmproj} is not a vision projector")

    def _close(self) -> None:
        """With the Llama. Its streams end."""
        self._alone.end()
        self._contents = None
        if self.mtmd_ctx is not None:
            self._free(self.mtmd_ctx)
            self.mtmd_ctx = None

    def _render(self, llama: Llama, messages: list[dict[str, Any]], **values: Any) -> str:
        bos, eos = (self._decode_token_piece(llama.detokenize([token])) for token in (llama.token_bos(), llama.token_eos()))
        source = llama.metadata.get("tokenizer.chat_template") or CHATML
        if "developer" not in source:
            messages = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
        try:
            formatter = Jinja2ChatFormatter(source, eos_token=eos, bos_token=bos)
            shaped: Any = [self._shaped(formatter, message) for message in messages]
            return formatter(messages=shaped, **values).prompt
        # a template is a program of the model's maker
        except Exception as error:
            raise ValueError(f"the model's chat template refuses these messages: {' '.join(str(error).split()) or type(error).__name__}") from error

    def _shaped(self, formatter: Jinja2ChatFormatter, message: dict[str, Any]) -> dict[str, Any]:
        """With the content as the template wants it for this role: a text, or a list of parts."""
        role, content = message["role"], message["content"]
        if (role, str) not in self._forms:
            self._forms |= {(role, kind): _takes(formatter, role, kind) for kind in (str, list)}
            gc.collect()  # an exception in Jinja leaves a cycle of frames, which would keep the Llama
        takes = {kind: self._forms[role, kind] for kind in (str, list)}
        if isinstance(content, list) and not takes[list]:
            content = "".join(part["text"] for part in content)
        elif isinstance(content, str) and takes[list] and not takes[str]:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content}

    def _fill(self, contents: LlamaContents, chunks: list[Chunk], pictures: list[Picture]) -> None:
        n_ctx, needed = contents.engine.n_ctx, sum(chunk.n_tokens for chunk in chunks)
        if needed >= n_ctx:
            # these words are what llama_cpp.server answers 400 to
            raise ValueError(f"Requested tokens ({needed}) exceed context window of {n_ctx}")
        contents.sync()
        self.stats = PromptStats()
        with interrupts.Interrupts(guest=True):
            fill(contents, chunks, pictures, self.stats, append=False, prefixes=contents.engine.prefixes)
        self.stats.tokens_reused = needed - self.stats.tokens_evaluated
        self.stats.images = list(contents.images)

    def _most_tokens(self, contents: LlamaContents, wanted: int | None) -> int:
        """Llama counts positions; here it is cells."""
        room = contents.engine.n_ctx - contents.n_cells
        return max(1, room if wanted is None or wanted <= 0 else min(room, wanted))


def _takes(formatter: Jinja2ChatFormatter, role: str, kind: type) -> bool:
    """Whether a template shows a content of this kind in a message of this role."""
    message: Any = {"role": role, "content": "probe" if kind is str else [{"type": "text", "text": "probe"}]}
    for messages in ([message], [{"role": "user", "content": "?"}, message]):
        try:
            text = formatter(messages=messages).prompt
        # not every role may come first
        except Exception:
            continue
        return "probe" in text and "'probe'" not in text
    return kind is str


def _chat_answer(answer: Any, form: Form, stream: bool) -> Any:
    """A completion as llama-cpp-python's chat completion, or its chunks."""
    name = form.tools[0]["function"]["name"] if len(form.tools) == 1 else None
    if len(form.tools) > 1:
        choice = answer["choices"][0]
        if call := form.split(choice["text"], choice["finish_reason"] == "stop"):
            name, choice["text"] = call
        if stream:
            # the text, and then the end without a text, as llama-cpp-python has it
            answer = iter([{**answer, "choices": [{**choice, **part}]} for part in ({"finish_reason": None}, {"text": ""})])
    if name is not None:
        return llama_chat_format._convert_completion_to_chat_function(name, answer, stream)
    return llama_chat_format._convert_completion_to_chat(answer, stream=stream)
