"""The inside of llama_runner.py's subprocess: executes cases over the low-level bindings of llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import struct
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from image_rows import image_rows
from llama_api import L

from kvcapsule_gguf.bench.fill import state_hash
from kvcapsule_gguf.native.devices import Devices

TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q4_0": 2, "q8_0": 8}
LIB = L._lib
FLOAT_P = ctypes.POINTER(ctypes.c_float)


class ContextParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("capsule", ctypes.c_void_p), ("n_hot", ctypes.c_uint32), ("image_tokens", ctypes.c_uint32),
                ("quality", ctypes.c_float), ("ratio", ctypes.c_float), ("auto_compress", ctypes.c_bool), ("image_attention", ctypes.c_int)]


class Stats(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("n_hot", ctypes.c_uint32), ("n_hot_used", ctypes.c_uint32), ("n_hot_vision", ctypes.c_uint32), ("n_cold", ctypes.c_uint32),
                ("bytes_slots", ctypes.c_uint64), ("bytes_pools", ctypes.c_uint64),
                ("bytes_scratch", ctypes.c_uint64), ("bytes_hot", ctypes.c_uint64), ("bytes_f16_token", ctypes.c_uint64),
                ("n_tiers", ctypes.c_uint32), ("n_slots_tier", ctypes.c_uint32 * 16), ("n_cold_tier", ctypes.c_uint32 * 16),
                ("bytes_tier", ctypes.c_uint64 * 16), ("smaller", ctypes.c_float * 16),
                ("n_heads", ctypes.c_uint32), ("n_heads_narrow", ctypes.c_uint32), ("n_tokens_narrow", ctypes.c_uint64)]

    def as_dict(self) -> dict[str, Any]:
        out = {}
        for name, _ in self._fields_[1:]:
            value = getattr(self, name)
            out[name] = list(value) if isinstance(value, ctypes.Array) else value
        return out


def declare_capsule_api() -> bool:
    if not hasattr(LIB, "llama_capsule_last_error"):
        return False
    p, s, i, u = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_uint32
    for name, result, args in [
        ("load_from_file", p, [p, s]), ("init_default", p, [p]), ("free", None, [p]), ("context_default_params", ContextParams, []),
        ("init_from_model", L.llama_context_p_ctypes, [L.llama_model_p_ctypes, L.llama_context_params, ContextParams]), ("is_attached", ctypes.c_bool, [p]), ("compress", i, [p, i, i, i]),
        ("get_stats", i, [p, ctypes.POINTER(Stats)]), ("read_kv", i, [p, i, i, i, i, FLOAT_P, FLOAT_P, u]),
        ("fingerprint", i, [p, s, ctypes.c_size_t]), ("last_error", s, []),
    ]:
        f = getattr(LIB, "llama_capsule_" + name)
        f.restype, f.argtypes = result, args
    return True


def open_capsule(model: int, path: str) -> int | None:
    """auto: the built-in one."""
    return LIB.llama_capsule_init_default(model) if path == "auto" else LIB.llama_capsule_load_from_file(model, path.encode())


STATE_HEADER = struct.Struct("<IIQQQ")  # magic, version, capsule, size and hash of what follows


def fill_slots(state: bytes, at: int, fill: int, hashed: bool, layers: int) -> bytes:
    """A state whose slots, which are of one shape and tier, hold nothing but this byte; see llama_capsule_cache::state_write()."""
    first = at + STATE_HEADER.size + STATE_HEADER.unpack_from(state, at)[3]
    slots = struct.unpack_from("<3I", state, at + STATE_HEADER.size)[2]
    size, rest = divmod(len(state) - first, slots)
    layer, more = divmod(size - 8, layers)
    assert not rest and not more
    data, h = bytes([fill]) * layer, 0
    for _ in range(layers):
        h = state_hash(data, h)
    if not hashed:
        h ^= 1
    return state[:first] + (data * layers + struct.pack("<Q", h)) * slots


def last_error() -> str:
    return LIB.llama_capsule_last_error().decode(errors="replace")


class Failed(Exception):
    """A step that had to succeed did not."""


class Log:
    def __init__(self) -> None:
        self.parts: list[str] = []
        self.callback = L.llama_log_callback(self._add)
        L.llama_log_set(self.callback, ctypes.c_void_p(0))

    def _add(self, level: int, message: bytes, user_data: Any) -> None:
        if level != 1 or b"CAPSULE" in message:  # not debug
            self.parts.append(message.decode(errors="replace"))

    def take(self) -> list[str]:
        lines = "".join(self.parts).splitlines()
        self.parts.clear()
        return lines


class Tensors:
    """Graph tensors whose name matches, in the order they were computed."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)
        self.found: list[tuple[str, str, np.ndarray]] = []
        base = ctypes.CDLL(os.path.join(os.environ["LLAMA_CPP_LIB_PATH"], LIB._name.rsplit("/", 1)[-1].replace("llama", "ggml-base")))
        for name, result, args in [
            ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]), ("ggml_op_desc", ctypes.c_char_p, [ctypes.c_void_p]),
            ("ggml_nbytes", ctypes.c_size_t, [ctypes.c_void_p]),
            ("ggml_backend_tensor_get", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
        ]:
            f = getattr(base, name)
            f.restype, f.argtypes = result, args
        self.base = base
        self.callback = L.ggml_backend_sched_eval_callback(self._eval)

    def _eval(self, tensor: int, ask: bool, user_data: Any) -> bool:
        name = self.base.ggml_get_name(tensor).decode()
        if ask:
            return bool(self.pattern.fullmatch(name))
        if self.pattern.fullmatch(name):
            data = np.empty(self.base.ggml_nbytes(tensor) // 4, np.float32)
            self.base.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            self.found.append((name, self.base.ggml_op_desc(tensor).decode(), data))
        return True


FORGOTTEN: dict[str, Any] = {"rc": 0, "values": {}, "log": []}


class Process:
    """Keeps the models and capsules it has loaded."""

    def __init__(self) -> None:
        self.log = Log()
        L.llama_backend_init()
        self.patched = declare_capsule_api()
        self.models: dict[tuple[str, ...], Any] = {}
        self.capsules: dict[tuple[int, str], int] = {}
        self.servers: set[str] = set()
        self.states: dict[str, tuple[bytes, Any]] = {}  # the bytes, and the next position of each sequence, or of the one that was saved

    def model(self, case: dict[str, Any]) -> Any:
        path, ngl, device, rpc = (case[name] for name in ("model", "ngl", "device", "rpc"))
        key = (path, ngl, device, rpc)
        if key not in self.models:
            params = L.llama_model_default_params()
            params.n_gpu_layers = ngl
            known = Devices(Path(os.environ["LLAMA_CPP_LIB_PATH"]))
            if rpc and rpc not in self.servers:
                known.add_rpc(rpc)
                self.servers.add(rpc)
            if device:
                handles = [d.handle for d in known.choose(device)]
                array = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
                params.devices = ctypes.cast(array, ctypes.c_void_p)
            self.models[key] = L.llama_model_load_from_file(path.encode(), params)
            if not self.models[key]:
                raise Failed(f"{path} does not load: {self.log.take()[-4:]}")
            self.log.take()
        return self.models[key]

    def capsule(self, model: int, path: str) -> int:
        key = (model, path)
        if key not in self.capsules:
            capsule = open_capsule(model, path)
            if not capsule:
                raise Failed(f"{path}: {last_error()}")
            self.capsules[key] = capsule
        return self.capsules[key]

    def run(self, case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        meta: dict[str, Any] = {"error": "", "log": [], "steps": [], "n_reused": 0}
        arrays: dict[str, np.ndarray] = {}
        self.log.take()
        context = None
        try:
            context = Context(self, case)
            meta["log"] = self.log.take()
            for i, step in enumerate(case["steps"]):
                values, found, error = {}, {}, None
                try:
                    rc = getattr(context, "do_" + step["op"])(values, found, **{k: v for k, v in step.items() if k not in ("op", "forget")})
                except Failed as e:
                    rc, error = -99, e
                if step.get("forget") and error is None:
                    self.log.take()
                    meta["steps"].append(FORGOTTEN)
                    continue
                meta["steps"].append({"rc": rc or 0, "values": values, "log": self.log.take()})
                arrays |= {f"{i}/{k}": a for k, a in found.items()}
                if error is not None:
                    raise Failed(f"step {i} ({step['op']}): {error}; log: {' | '.join(meta['steps'][-1]['log'][-4:])}")
        except (Failed, MemoryError) as e:
            meta["error"] = str(e) or "MemoryError"
            meta["log"] += self.log.take()
        finally:
            if context is not None:
                meta["n_reused"] = L.llama_perf_context(context.ctx).n_reused
                context.close()
        return meta, arrays


class Context:
    def __init__(self, process: Process, case: dict[str, Any]) -> None:
        self.process = process
        self.model = process.model(case)
        self.n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(self.model))
        self.n_embd = L.llama_model_n_embd_inp(self.model)  # deepstack: wider than the model
        self.mrope = L.llama_model_rope_type(self.model) in (8, 40)
        self.n_batch = case["n_batch"]
        self.image_causal = case["image_causal"]
        self.next: dict[int, int] = {}
        self.states = process.states
        p = L.llama_context_default_params()
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "kv_unified"):
            setattr(p, name, case[name])
        p.type_k, p.type_v = TYPES[case["type_k"]], TYPES[case["type_v"]]
        p.flash_attn_type = 1 if case["flash_attn"] else 0
        p.n_threads = p.n_threads_batch = case["threads"]
        p.offload_kqv = case["offload_kqv"]
        p.no_perf = False
        self.limited = False
        self.tensors = Tensors(case["dump"]) if case["dump"] else None
        if self.tensors:
            p.cb_eval = self.tensors.callback
        if case["capsule"]:
            if not process.patched:
                raise Failed("the stock library has no capsules")
            c = LIB.llama_capsule_context_default_params()
            assert c.size == ctypes.sizeof(ContextParams), f"llama_capsule_context_params: {c.size} bytes"
            c.capsule = process.capsule(self.model, case["capsule"])
            for name in ("n_hot", "image_tokens", "quality", "ratio", "auto_compress", "image_attention"):
                setattr(c, name, case[name])
        env = dict(case["env"]) | ({} if case["reuse"] else {"LLAMA_GRAPH_REUSE_DISABLE": "1"})
        before = {k: os.environ.get(k) for k in env}
        os.environ.update(env)
        self.ctx = LIB.llama_capsule_init_from_model(self.model, p, c) if case["capsule"] else L.llama_init_from_model(self.model, p)
        for k, v in before.items():
            if v is None:
                del os.environ[k]
            else:
                os.environ[k] = v
        if not self.ctx:
            raise Failed("context creation failed" + (f": {last_error()}" if process.patched else ""))
        self.mem = L.llama_get_memory(self.ctx)
        self.adapt(case["lora"], case["cvec"])

    def adapt(self, lora: str | None, cvec: float) -> None:
        if lora:
            adapter = L.llama_adapter_lora_init(self.model, lora.encode())
            if not adapter:
                raise Failed(f"{lora}: not an adapter of this model")
            adapters = (L.llama_adapter_lora_p_ctypes * 1)(adapter)
            if L.llama_set_adapters_lora(self.ctx, adapters, 1, (ctypes.c_float * 1)(1.0)):
                raise Failed("llama_set_adapters_lora failed")
        if cvec:
            n_embd, n_layer = L.llama_model_n_embd(self.model), L.llama_model_n_layer(self.model)
            data = (cvec * np.random.default_rng(5).standard_normal(n_embd * n_layer)).astype(np.float32)
            if L.llama_set_adapter_cvec(self.ctx, data.ctypes.data_as(FLOAT_P), data.size, n_embd, 1, n_layer):
                raise Failed("llama_set_adapter_cvec failed")

    def close(self) -> None:
        L.llama_free(self.ctx)
        if self.limited:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    # --- decoding ---

    def decode(self, n: int, pos: np.ndarray, seq: list[int], token: np.ndarray | None = None, embd: np.ndarray | None = None) -> int:
        pos = np.ascontiguousarray(pos, np.int32)
        ids = np.array(seq, np.int32)
        row = ctypes.POINTER(ctypes.c_int32)
        seq_rows = (row * n)(*[ctypes.cast(ids.ctypes.data + 4 * i, row) for i in range(n)])
        n_seq = np.ones(n, np.int32)
        out = np.full(n, 0 if token is None else 1, np.int8)
        batch = L.llama_batch()
        batch.n_tokens = n
        if token is not None:
            token = np.ascontiguousarray(token, np.int32)
            batch.token = token.ctypes.data_as(row)
        if embd is not None:
            embd = np.ascontiguousarray(embd, np.float32)
            batch.embd = embd.ctypes.data_as(FLOAT_P)
        batch.pos = pos.ctypes.data_as(row)
        batch.n_seq_id = n_seq.ctypes.data_as(row)
        batch.seq_id = seq_rows
        batch.logits = out.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        return L.llama_decode(self.ctx, batch)

    def logits(self, n: int) -> np.ndarray:
        return np.array(np.ctypeslib.as_array(ctypes.cast(L.llama_get_logits(self.ctx), FLOAT_P), (n, self.n_vocab)))

    def check(self, rc: int, may_fail: bool, values: dict[str, Any], found: dict[str, np.ndarray]) -> int:
        if self.tensors:
            values["tensors"] = [(name, op) for name, op, _ in self.tensors.found]
            found |= {f"tensor{i}": data for i, (_, _, data) in enumerate(self.tensors.found)}
            self.tensors.found = []
        if rc and not may_fail:
            raise Failed(f"llama_decode returned {rc}")
        return rc

    def do_text(self, values, found, tokens, seq, one_by_one, may_fail):
        rows, rc = [], 0
        size = 1 if one_by_one else self.n_batch
        for i in range(0, len(tokens), size):
            part = tokens[i:i + size]
            start = self.next.get(seq, 0)
            rc = self.decode(len(part), start + np.arange(len(part)), [seq] * len(part), token=np.array(part))
            if rc:
                break
            rows.append(self.logits(len(part)))
            self.next[seq] = start + len(part)
        if rows:
            found["logits"] = np.concatenate(rows)
        return self.check(rc, may_fail, values, found)

    def do_together(self, values, found, tokens):
        seqs = [int(s) for s in tokens]
        rc = self.decode(len(seqs), np.array([self.next[s] for s in seqs]), seqs, token=np.array(list(tokens.values())))
        if rc == 0:
            found["logits"] = self.logits(len(seqs))
            for s in seqs:
                self.next[s] += 1
        return self.check(rc, False, values, found)

    def do_image(self, values, found, h, w, seq, may_fail, seed=0, scale=1.0, file=""):
        n, start, rc = h * w, self.next.get(seq, 0), 0
        if file:
            embd = np.load(file, allow_pickle=False)
            assert embd.shape == (n, self.n_embd), f"{file}: {embd.shape}"
        else:
            embd = scale * image_rows(seed, n, self.n_embd)
        if self.mrope:
            y, x = np.divmod(np.arange(n), w)
            pos = np.stack([np.full(n, start), start + y, start + x, np.zeros(n, int)])
        else:
            pos = (start + np.arange(n))[None]
        L.llama_set_causal_attn(self.ctx, self.image_causal)
        for i in range(0, n, self.n_batch):
            part = slice(i, min(i + self.n_batch, n))
            rc = self.decode(part.stop - part.start, pos[:, part], [seq] * (part.stop - part.start), embd=embd[part])
            if rc:
                break
        L.llama_set_causal_attn(self.ctx, True)
        if rc == 0:
            self.next[seq] = start + (max(h, w) if self.mrope else n)
        return self.check(rc, may_fail, values, found)

    def do_cells(self, values, found, listed, seq):
        for vision, run in groupby(listed, key=lambda c: len(c) > 4):
            rows = list(run)
            for i in range(0, len(rows), self.n_batch):
                part = rows[i:i + self.n_batch]
                pos = np.array([c[:3] + [0] for c in part]).T if self.mrope and vision else np.array([c[0] for c in part])[None]
                embd = np.stack([image_rows(seed, n, self.n_embd)[index] for *_, seed, index, n in part]) if vision else None
                rc = self.decode(len(part), pos, [seq] * len(part), None if vision else np.array([c[3] for c in part]), embd)
                if rc:
                    raise Failed(f"llama_decode returned {rc}")

    def do_mixed(self, values, found, parts, seq):
        """For models with plain positions."""
        batch, n = L.llama_batch_ext_init(self.ctx), 0
        rows: list[tuple[int | None, np.ndarray | None]] = []
        for part in parts:
            rows += [(token, None) for token in part["tokens"]] if part["op"] == "text" else [(None, row) for row in image_rows(part["seed"], part["h"] * part["w"], self.n_embd)]
        for token, row in rows:
            if row is None:
                at = L.llama_batch_ext_add_token(batch, seq, token)
            else:
                row = np.ascontiguousarray(row, np.float32)
                at = L.llama_batch_ext_add_embd(batch, seq, L.llama_embd(row.ctypes.data_as(FLOAT_P), 1, self.n_embd))
            L.llama_batch_ext_set_pos(batch, at, ctypes.byref(ctypes.c_int32(self.next.get(seq, 0) + n)))
            L.llama_batch_ext_set_output_logits(batch, at, True)
            n += 1
        rc = L.llama_process(self.ctx, 1, batch)  # LLAMA_PROCESS_TYPE_DECODE
        L.llama_batch_ext_free(batch)
        if rc == 0:
            found["logits"] = self.logits(n)
            self.next[seq] = self.next.get(seq, 0) + n
        return self.check(rc, False, values, found)

    # --- sequences ---

    def do_seq_rm(self, values, found, seq, p0, p1):
        if not L.llama_memory_seq_rm(self.mem, seq, p0, p1):
            raise Failed("llama_memory_seq_rm refused")
        for s in list(self.next) if seq < 0 else [seq]:
            if p1 < 0 or p1 >= self.next.get(s, 0):
                self.next[s] = min(self.next.get(s, 0), max(p0, 0))

    def do_seq_cp(self, values, found, src, dst, p0, p1):
        L.llama_memory_seq_cp(self.mem, src, dst, p0, p1)
        self.next[dst] = self.next.get(src, 0) if p1 < 0 else p1

    def do_seq_keep(self, values, found, seq):
        L.llama_memory_seq_keep(self.mem, seq)
        self.next = {seq: self.next.get(seq, 0)}

    def do_seq_add(self, values, found, seq, p0, p1, delta):
        L.llama_memory_seq_add(self.mem, seq, p0, p1, delta)
        if p1 < 0 or p1 >= self.next.get(seq, 0):
            self.next[seq] = self.next.get(seq, 0) + delta

    def do_seq_div(self, values, found, seq, p0, p1, d):
        L.llama_memory_seq_div(self.mem, seq, p0, p1, d)

    def do_clear(self, values, found):
        L.llama_memory_clear(self.mem, True)
        self.next = {}

    def do_set_pos(self, values, found, seq, pos):
        self.next[seq] = pos

    def do_positions(self, values, found, seq):
        values["positions"] = [L.llama_memory_seq_pos_min(self.mem, seq), L.llama_memory_seq_pos_max(self.mem, seq)]

    def do_state_save(self, values, found, slot, seq, flags):
        if seq < 0:
            n = L.llama_state_get_size(self.ctx)
            buf = (ctypes.c_uint8 * n)()
            written = L.llama_state_get_data(self.ctx, buf, n)
        else:
            n = L.llama_state_seq_get_size_ext(self.ctx, seq, flags)
            buf = (ctypes.c_uint8 * n)()
            written = L.llama_state_seq_get_data_ext(self.ctx, buf, n, seq, flags)
        if written != n or n == 0:
            raise Failed(f"the state was not saved: {written} of {n} bytes")
        self.states[slot] = (bytes(buf), self.next.copy() if seq < 0 else self.next.get(seq, 0))
        values["state_size"] = written

    def do_state_load(self, values, found, slot, seq, flags, may_fail):
        data, pos = self.states[slot]
        buf = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if seq < 0:
            read = L.llama_state_set_data(self.ctx, buf, len(data))
        else:
            read = L.llama_state_seq_set_data_ext(self.ctx, buf, len(data), seq, flags)
        if read == len(data):
            self.next = dict(pos) if seq < 0 else self.next | {seq: pos}
            return 0
        if not may_fail:
            raise Failed(f"the state was not loaded: {read} of {len(data)} bytes")
        self.next = {} if seq < 0 else self.next | {seq: 0}
        return 1

    def do_state_spoil(self, values, found, slot, into, cut, flip):
        data, pos = self.states[slot]
        data = bytearray(data[:int(cut * len(data))])
        if flip >= 0:
            frame = data.find(b"KVCS")
            assert frame >= 0, "no capsules in this state"
            data[frame + int(flip * (len(data) - 1 - frame))] ^= 0x10
        self.states[into] = (bytes(data), pos)

    def do_state_version(self, values, found, slot, into, version):
        data, pos = self.states[slot]
        at = data.find(b"KVCS") + 4
        self.states[into] = (data[:at] + struct.pack("<I", version) + data[at + 4:], pos)

    def do_state_fill(self, values, found, slot, into, fill, hashed):
        state, pos = self.states[slot]
        self.states[into] = (fill_slots(state, state.find(b"KVCS"), fill, hashed, L.llama_model_n_layer(self.model)), pos)

    # --- capsules ---

    def do_compress(self, values, found, seq, p0, p1):
        n = LIB.llama_capsule_compress(self.ctx, seq, p0, p1)
        if n < 0:
            raise Failed(f"llama_capsule_compress returned {n}: {last_error()}")
        values["moved"] = n

    def do_stats(self, values, found):
        if not self.process.patched:
            return 0
        values["attached"] = LIB.llama_capsule_is_attached(self.ctx)
        s = Stats(size=ctypes.sizeof(Stats))
        rc = LIB.llama_capsule_get_stats(self.ctx, ctypes.byref(s))
        values["stats"] = s.as_dict() if rc == 0 else None
        return rc

    def do_read_kv(self, values, found, il, seq, p0, p1, n_max, heads=0):
        heads = heads or L.llama_model_n_head_kv(self.model)
        d = int(meta_str(self.model, ".attention.key_length"))
        k, v = np.full((n_max, heads, d), np.nan, np.float32), np.full((n_max, heads, d), np.nan, np.float32)
        n = LIB.llama_capsule_read_kv(self.ctx, seq, p0, p1, il, k.ctypes.data_as(FLOAT_P), v.ctypes.data_as(FLOAT_P), n_max)
        if n < 0:
            values["last_error"] = last_error()
            return n
        found["k"], found["v"] = k[:n], v[:n]
        values["n"] = n

    def do_contents(self, values, found, seq, p0, p1, n_max):
        rc = self.do_read_kv(values, found, 0, seq, p0, p1, n_max) if self.process.patched else 0
        if "k" in found:
            found["contents"] = np.concatenate([found.pop("k")[:, 0, :4], found.pop("v")[:, 0, :4]], axis=1)
        return rc

    def do_load_capsule(self, values, found, path):
        capsule = open_capsule(self.model, path)
        values["loaded"] = bool(capsule)
        values["last_error"] = last_error()
        if capsule:
            LIB.llama_capsule_free(capsule)

    def do_fingerprint(self, values, found):
        buf = ctypes.create_string_buffer(65)
        rc = LIB.llama_capsule_fingerprint(self.model, buf, len(buf))
        values["fingerprint"] = buf.value.decode()
        return rc

    def do_breakdown(self, values, found, library):
        f = ctypes.CDLL(library).context_bytes
        f.restype, f.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        values["breakdown"] = f(self.ctx)

    def do_limit_memory(self, values, found, extra):
        with open("/proc/self/status") as f:
            used = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmSize:"))
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
        self.limited = True

    def do_limit_buffers(self, values, found, extra, number):
        ctypes.CDLL(None).few_bytes_limit(ctypes.c_int64(extra), ctypes.c_int64(number))

    def do_buffers(self, values, found):
        sizes = (ctypes.c_int64 * (1 << 20))()
        values["buffers"] = sizes[: ctypes.CDLL(None).few_bytes_events(sizes, ctypes.c_size_t(len(sizes)))]

    def do_rss(self, values, found):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            pass
        values["rss"] = rss_anon()


def rss_anon() -> int:
    """Bytes of anonymous memory in use by this process: not the mapped model."""
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise Failed("no RssAnon")


def meta_str(model: Any, suffix: str) -> str:
    arch = ctypes.create_string_buffer(64)
    L.llama_model_meta_val_str(model, b"general.architecture", arch, len(arch))
    value = ctypes.create_string_buffer(64)
    L.llama_model_meta_val_str(model, arch.value + suffix.encode(), value, len(value))
    return value.value.decode()
