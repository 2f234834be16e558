"""What KVCapsule uses of llama.cpp's C API. scripts/bindings made it from the headers: run that again in place of editing this."""

import ctypes as c

ggml_abort_callback = c.CFUNCTYPE(c.c_bool, c.c_void_p)
ggml_log_callback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
ggml_backend_buffer_type_t = c.c_void_p
ggml_backend_dev_t = c.c_void_p
ggml_backend_sched_eval_callback = c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_bool, c.c_void_p)
llama_memory_t = c.c_void_p
llama_pos = c.c_int32
llama_token = c.c_int32
llama_seq_id = c.c_int32
LLAMA_VOCAB_TYPE_NONE = 0
LLAMA_ROPE_TYPE_MROPE = 8
LLAMA_ROPE_TYPE_IMROPE = 40
LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
LLAMA_FLASH_ATTN_TYPE_ENABLED = 1


class llama_token_data(c.Structure):
    _fields_ = [
        ("id", llama_token),
        ("logit", c.c_float),
        ("p", c.c_float),
    ]


class llama_token_data_array(c.Structure):
    _fields_ = [
        ("data", c.POINTER(llama_token_data)),
        ("size", c.c_size_t),
        ("selected", c.c_int64),
        ("sorted", c.c_bool),
    ]


llama_progress_callback = c.CFUNCTYPE(c.c_bool, c.c_float, c.c_void_p)


class llama_batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(llama_token)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(llama_pos)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(llama_seq_id))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class llama_model_kv_override_value(c.Union):
    _fields_ = [
        ("val_i64", c.c_int64),
        ("val_f64", c.c_double),
        ("val_bool", c.c_bool),
        ("val_str", c.c_char * 128),
    ]


class llama_model_kv_override(c.Structure):
    _anonymous_ = ["value"]
    _fields_ = [
        ("tag", c.c_int),
        ("key", c.c_char * 128),
        ("value", llama_model_kv_override_value),
    ]


class llama_model_tensor_buft_override(c.Structure):
    _fields_ = [
        ("pattern", c.c_char_p),
        ("buft", ggml_backend_buffer_type_t),
    ]


class llama_model_params(c.Structure):
    _fields_ = [
        ("devices", c.POINTER(ggml_backend_dev_t)),
        ("tensor_buft_overrides", c.POINTER(llama_model_tensor_buft_override)),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int),
        ("load_mode", c.c_int),
        ("lazy_mode", c.c_int),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.POINTER(c.c_float)),
        ("progress_callback", llama_progress_callback),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.POINTER(llama_model_kv_override)),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
    ]


class llama_sampler_seq_config(c.Structure):
    _fields_ = [
        ("seq_id", llama_seq_id),
        ("sampler", c.c_void_p),
    ]


class llama_context_params(c.Structure):
    _fields_ = [
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int),
        ("rope_scaling_type", c.c_int),
        ("pooling_type", c.c_int),
        ("attention_type", c.c_int),
        ("flash_attn_type", c.c_int),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", ggml_backend_sched_eval_callback),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("abort_callback", ggml_abort_callback),
        ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.POINTER(llama_sampler_seq_config)),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    ]


class llama_sampler_chain_params(c.Structure):
    _fields_ = [
        ("no_perf", c.c_bool),
    ]


llama_sampler_context_t = c.c_void_p


class llama_sampler_data(c.Structure):
    _fields_ = [
        ("logits", c.c_void_p),
        ("probs", c.c_void_p),
        ("sampled", c.c_void_p),
        ("candidates", c.c_void_p),
    ]


class llama_sampler_i(c.Structure):
    _fields_ = [
        ("name", c.CFUNCTYPE(c.c_char_p, c.c_void_p)),
        ("accept", c.CFUNCTYPE(None, c.c_void_p, llama_token)),
        ("apply", c.CFUNCTYPE(None, c.c_void_p, c.POINTER(llama_token_data_array))),
        ("reset", c.CFUNCTYPE(None, c.c_void_p)),
        ("clone", c.CFUNCTYPE(c.c_void_p, c.c_void_p)),
        ("free", c.CFUNCTYPE(None, c.c_void_p)),
        ("backend_init", c.CFUNCTYPE(c.c_bool, c.c_void_p, ggml_backend_buffer_type_t, c.c_uint32)),
        ("backend_accept", c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_void_p, c.c_void_p)),
        ("backend_apply", c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_void_p, c.POINTER(llama_sampler_data))),
        ("backend_set_input", c.CFUNCTYPE(None, c.c_void_p)),
        ("backend_reset", c.CFUNCTYPE(None, c.c_void_p)),
        ("copy_state", c.CFUNCTYPE(None, c.c_void_p, c.c_void_p)),
    ]


class llama_sampler(c.Structure):
    _fields_ = [
        ("iface", c.POINTER(llama_sampler_i)),
        ("ctx", llama_sampler_context_t),
    ]


class llama_capsule_context_params(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("capsule", c.c_void_p),
        ("n_hot", c.c_uint32),
        ("image_tokens", c.c_uint32),
        ("quality", c.c_float),
        ("ratio", c.c_float),
        ("auto_compress", c.c_bool),
        ("image_attention", c.c_int),
    ]


class llama_capsule_stats(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("n_hot", c.c_uint32),
        ("n_hot_used", c.c_uint32),
        ("n_hot_vision", c.c_uint32),
        ("n_cold", c.c_uint32),
        ("bytes_slots", c.c_uint64),
        ("bytes_pools", c.c_uint64),
        ("bytes_scratch", c.c_uint64),
        ("bytes_hot", c.c_uint64),
        ("bytes_f16_token", c.c_uint64),
        ("n_tiers", c.c_uint32),
        ("n_slots_tier", c.c_uint32 * 16),
        ("n_cold_tier", c.c_uint32 * 16),
        ("bytes_tier", c.c_uint64 * 16),
        ("smaller", c.c_float * 16),
        ("n_heads", c.c_uint32),
        ("n_heads_narrow", c.c_uint32),
        ("n_tokens_narrow", c.c_uint64),
    ]


MTMD_INPUT_CHUNK_TYPE_TEXT = 0
MTMD_INPUT_CHUNK_TYPE_IMAGE = 1


class mtmd_input_text(c.Structure):
    _fields_ = [
        ("text", c.c_char_p),
        ("text_len", c.c_size_t),
        ("add_special", c.c_bool),
        ("parse_special", c.c_bool),
    ]


mtmd_progress_callback = c.CFUNCTYPE(c.c_bool, c.c_float, c.c_void_p)


class mtmd_context_params(c.Structure):
    _fields_ = [
        ("use_gpu", c.c_bool),
        ("device", ggml_backend_dev_t),
        ("print_timings", c.c_bool),
        ("n_threads", c.c_int),
        ("image_marker", c.c_char_p),
        ("media_marker", c.c_char_p),
        ("flash_attn_type", c.c_int),
        ("warmup", c.c_bool),
        ("image_min_tokens", c.c_int),
        ("image_max_tokens", c.c_int),
        ("cb_eval", ggml_backend_sched_eval_callback),
        ("cb_eval_user_data", c.c_void_p),
        ("batch_max_tokens", c.c_int32),
        ("progress_callback", mtmd_progress_callback),
        ("progress_callback_user_data", c.c_void_p),
    ]


class mtmd_helper_embd_batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("embd", c.POINTER(c.c_float)),
        ("n_embd", c.c_int32),
        ("pos", c.POINTER(llama_pos)),
        ("n_pos", c.c_int32),
        ("seq_id", llama_seq_id),
    ]


mtmd_helper_post_decode_callback = c.CFUNCTYPE(c.c_int32, c.POINTER(mtmd_helper_embd_batch), c.c_void_p)

LLAMA = {
    "llama_model_default_params": (llama_model_params, []),
    "llama_context_default_params": (llama_context_params, []),
    "llama_sampler_chain_default_params": (llama_sampler_chain_params, []),
    "llama_backend_init": (None, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, llama_model_params]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, llama_context_params]),
    "llama_free": (None, [c.c_void_p]),
    "llama_n_ctx": (c.c_uint32, [c.c_void_p]),
    "llama_n_batch": (c.c_uint32, [c.c_void_p]),
    "llama_n_ubatch": (c.c_uint32, [c.c_void_p]),
    "llama_get_memory": (llama_memory_t, [c.c_void_p]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_model_rope_type": (c.c_int, [c.c_void_p]),
    "llama_model_n_ctx_train": (c.c_int32, [c.c_void_p]),
    "llama_model_n_embd_inp": (c.c_int32, [c.c_void_p]),
    "llama_model_n_layer": (c.c_int32, [c.c_void_p]),
    "llama_model_n_swa": (c.c_int32, [c.c_void_p]),
    "llama_vocab_type": (c.c_int, [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_model_meta_val_str": (c.c_int32, [c.c_void_p, c.c_char_p, c.c_char_p, c.c_size_t]),
    "llama_model_chat_template": (c.c_char_p, [c.c_void_p, c.c_char_p]),
    "llama_model_has_encoder": (c.c_bool, [c.c_void_p]),
    "llama_model_has_decoder": (c.c_bool, [c.c_void_p]),
    "llama_memory_clear": (None, [llama_memory_t, c.c_bool]),
    "llama_memory_seq_rm": (c.c_bool, [llama_memory_t, llama_seq_id, llama_pos, llama_pos]),
    "llama_memory_seq_cp": (None, [llama_memory_t, llama_seq_id, llama_seq_id, llama_pos, llama_pos]),
    "llama_memory_seq_pos_min": (llama_pos, [llama_memory_t, llama_seq_id]),
    "llama_memory_seq_pos_max": (llama_pos, [llama_memory_t, llama_seq_id]),
    "llama_state_seq_get_size": (c.c_size_t, [c.c_void_p, llama_seq_id]),
    "llama_state_seq_get_data": (c.c_size_t, [c.c_void_p, c.POINTER(c.c_uint8), c.c_size_t, llama_seq_id]),
    "llama_state_seq_set_data": (c.c_size_t, [c.c_void_p, c.POINTER(c.c_uint8), c.c_size_t, llama_seq_id]),
    "llama_batch_get_one": (llama_batch, [c.POINTER(llama_token), c.c_int32]),
    "llama_batch_init": (llama_batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_batch_free": (None, [llama_batch]),
    "llama_decode": (c.c_int32, [c.c_void_p, llama_batch]),
    "llama_set_abort_callback": (None, [c.c_void_p, ggml_abort_callback, c.c_void_p]),
    "llama_synchronize": (None, [c.c_void_p]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_get_logits_ith": (c.POINTER(c.c_float), [c.c_void_p, c.c_int32]),
    "llama_vocab_is_eog": (c.c_bool, [c.c_void_p, llama_token]),
    "llama_vocab_bos": (llama_token, [c.c_void_p]),
    "llama_vocab_eos": (llama_token, [c.c_void_p]),
    "llama_vocab_get_add_bos": (c.c_bool, [c.c_void_p]),
    "llama_tokenize": (c.c_int32, [c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(llama_token), c.c_int32, c.c_bool, c.c_bool]),
    "llama_token_to_piece": (c.c_int32, [c.c_void_p, llama_token, c.c_char_p, c.c_int32, c.c_int32, c.c_bool]),
    "llama_sampler_free": (None, [c.POINTER(llama_sampler)]),
    "llama_sampler_chain_init": (c.POINTER(llama_sampler), [llama_sampler_chain_params]),
    "llama_sampler_chain_add": (None, [c.POINTER(llama_sampler), c.POINTER(llama_sampler)]),
    "llama_sampler_init_greedy": (c.POINTER(llama_sampler), []),
    "llama_sampler_init_dist": (c.POINTER(llama_sampler), [c.c_uint32]),
    "llama_sampler_init_top_k": (c.POINTER(llama_sampler), [c.c_int32]),
    "llama_sampler_init_top_p": (c.POINTER(llama_sampler), [c.c_float, c.c_size_t]),
    "llama_sampler_init_min_p": (c.POINTER(llama_sampler), [c.c_float, c.c_size_t]),
    "llama_sampler_init_temp": (c.POINTER(llama_sampler), [c.c_float]),
    "llama_sampler_init_grammar": (c.POINTER(llama_sampler), [c.c_void_p, c.c_char_p, c.c_char_p]),
    "llama_sampler_init_penalties": (c.POINTER(llama_sampler), [c.c_int32, c.c_int32, c.c_float, c.c_float, c.c_float]),
    "llama_sampler_sample": (llama_token, [c.POINTER(llama_sampler), c.c_void_p, c.c_int32]),
    "llama_log_set": (None, [ggml_log_callback, c.c_void_p]),
}

CAPSULE = {
    "llama_capsule_load_from_file": (c.c_void_p, [c.c_void_p, c.c_char_p]),
    "llama_capsule_init_default": (c.c_void_p, [c.c_void_p]),
    "llama_capsule_free": (None, [c.c_void_p]),
    "llama_capsule_context_default_params": (llama_capsule_context_params, []),
    "llama_capsule_init_from_model": (c.c_void_p, [c.c_void_p, llama_context_params, llama_capsule_context_params]),
    "llama_capsule_is_attached": (c.c_bool, [c.c_void_p]),
    "llama_capsule_compress": (c.c_int32, [c.c_void_p, llama_seq_id, llama_pos, llama_pos]),
    "llama_capsule_get_stats": (c.c_int32, [c.c_void_p, c.POINTER(llama_capsule_stats)]),
    "llama_capsule_read_kv": (c.c_int32, [c.c_void_p, llama_seq_id, llama_pos, llama_pos, c.c_int32, c.POINTER(c.c_float), c.POINTER(c.c_float), c.c_uint32]),
    "llama_capsule_layer_shape": (c.c_int32, [c.c_void_p, c.c_int32, c.POINTER(c.c_int32)]),
    "llama_capsule_fingerprint": (c.c_int32, [c.c_void_p, c.c_char_p, c.c_size_t]),
    "llama_capsule_last_error": (c.c_char_p, []),
}

MTMD = {
    "mtmd_context_params_default": (mtmd_context_params, []),
    "mtmd_init_from_file": (c.c_void_p, [c.c_char_p, c.c_void_p, mtmd_context_params]),
    "mtmd_free": (None, [c.c_void_p]),
    "mtmd_decode_use_non_causal": (c.c_bool, [c.c_void_p, c.c_void_p]),
    "mtmd_support_vision": (c.c_bool, [c.c_void_p]),
    "mtmd_bitmap_init": (c.c_void_p, [c.c_uint32, c.c_uint32, c.POINTER(c.c_ubyte)]),
    "mtmd_bitmap_free": (None, [c.c_void_p]),
    "mtmd_bitmap_set_id": (None, [c.c_void_p, c.c_char_p]),
    "mtmd_input_chunks_init": (c.c_void_p, []),
    "mtmd_input_chunks_size": (c.c_size_t, [c.c_void_p]),
    "mtmd_input_chunks_get": (c.c_void_p, [c.c_void_p, c.c_size_t]),
    "mtmd_input_chunks_free": (None, [c.c_void_p]),
    "mtmd_input_chunk_get_type": (c.c_int, [c.c_void_p]),
    "mtmd_input_chunk_get_tokens_text": (c.POINTER(llama_token), [c.c_void_p, c.POINTER(c.c_size_t)]),
    "mtmd_input_chunk_get_tokens_image": (c.c_void_p, [c.c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c.c_size_t, [c.c_void_p]),
    "mtmd_input_chunk_get_id": (c.c_char_p, [c.c_void_p]),
    "mtmd_input_chunk_get_n_pos": (llama_pos, [c.c_void_p]),
    "mtmd_input_chunk_copy": (c.c_void_p, [c.c_void_p]),
    "mtmd_input_chunk_free": (None, [c.c_void_p]),
    "mtmd_image_tokens_get_nx": (c.c_size_t, [c.c_void_p]),
    "mtmd_tokenize": (c.c_int32, [c.c_void_p, c.c_void_p, c.POINTER(mtmd_input_text), c.POINTER(c.c_void_p), c.c_size_t]),
    "mtmd_encode_chunk": (c.c_int32, [c.c_void_p, c.c_void_p]),
    "mtmd_get_output_embd": (c.POINTER(c.c_float), [c.c_void_p]),
    "mtmd_log_set": (None, [ggml_log_callback, c.c_void_p]),
    "mtmd_helper_log_set": (None, [ggml_log_callback, c.c_void_p]),
    "mtmd_helper_eval_chunks": (c.c_int32, [c.c_void_p, c.c_void_p, c.c_void_p, llama_pos, llama_seq_id, c.c_int32, c.c_bool, c.POINTER(llama_pos)]),
    "mtmd_helper_eval_chunk_single": (c.c_int32, [c.c_void_p, c.c_void_p, c.c_void_p, llama_pos, llama_seq_id, c.c_int32, c.c_bool, c.POINTER(llama_pos)]),
    "mtmd_helper_decode_image_chunk": (c.c_int32, [c.c_void_p, c.c_void_p, c.c_void_p, c.POINTER(c.c_float), llama_pos, llama_seq_id, c.c_int32, c.POINTER(llama_pos),
        mtmd_helper_post_decode_callback, c.c_void_p]),
}
