"""The sampler chain of an answer."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from .args import Options
from .engine import Engine


@contextmanager
def chain(engine: Engine, options: Options) -> Iterator[int]:
    """A llama_sampler: penalties if wanted, then greedy at temperature 0, else top-k, top-p, min-p, temperature and a draw."""
    llama = engine.llama
    sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    try:
        stages = []
        if options.repeat_penalty != 1 and options.repeat_last_n:
            n_vocab = llama.llama_vocab_n_tokens(engine.vocab)
            stages.append(llama.llama_sampler_init_penalties(n_vocab, options.repeat_last_n, options.repeat_penalty, 0.0, 0.0))
        if options.temp <= 0:
            stages.append(llama.llama_sampler_init_greedy())
        else:
            seed = options.seed if options.seed >= 0 else secrets.randbits(32)
            stages += [
                llama.llama_sampler_init_top_k(options.top_k),
                llama.llama_sampler_init_top_p(options.top_p, 1),
                llama.llama_sampler_init_min_p(options.min_p, 1),
                llama.llama_sampler_init_temp(options.temp),
                llama.llama_sampler_init_dist(seed),
            ]
        for stage in stages:
            llama.llama_sampler_chain_add(sampler, stage)
        yield sampler
    finally:
        llama.llama_sampler_free(sampler)
