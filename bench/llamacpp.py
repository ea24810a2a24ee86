"""llama.cpp as a contestant. `pip install llama-cpp-python gguf` builds it for the processor of the
machine.

The weights come from a directory in the Hugging Face layout, in float32 or bfloat16, and are
written to a GGUF file without a vocabulary: inputs and outputs are token ids. Keys and values are
float16, the default of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedrl.engine.model.gguf_files import dtype_name, write_gguf
from fusedrl.engine.model.weights import load_decoder


class LlamaCpp:
    """A model of llama.cpp on one thread, and a context for so many sequences of so many tokens."""

    def __init__(self, file: Path, sequences: int, tokens: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), model)
        if not self._model:
            raise ValueError(f"llama.cpp: expected a model that it reads, got {file}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = sequences * -(-tokens // 256) * 256
        context.n_batch = context.n_ubatch = max(512, sequences * tokens)
        context.n_seq_max = sequences
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(sequences * tokens, 0, 1)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, whether it is drawn from), and draw greedily."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, drawn) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, drawn
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp: expected a step, got status {status}")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                pointer = self._api.llama_get_logits_ith(self._context, i)
                found.append(int(np.ctypeslib.as_array(pointer, (self._vocab,)).argmax()))
        return found

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Greedy completions, all sequences in one batch."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        completions = [[token] for token in self._decode(rows)]
        for step in range(new - 1):
            rows = [
                (completion[-1], len(prompt) + step, sequence, True)
                for sequence, (prompt, completion) in enumerate(
                    zip(prompts, completions, strict=True)
                )
            ]
            for completion, token in zip(completions, self._decode(rows), strict=True):
                completion.append(token)
        return completions

    def close(self) -> None:
        """Free what llama.cpp holds."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


def contestant(
    directory: Path, dtype: torch.dtype, prompts: Sequence[Sequence[int]], new: int, scratch: Path
) -> Callable[[], list[list[int]]]:
    """Greedy completions of the prompts by llama.cpp; the file is written to `scratch`."""
    file = scratch / f"{str(dtype).removeprefix('torch.')}.gguf"
    if not file.is_file():
        write_gguf(load_decoder(directory, dtype, "cpu"), file, dtype=dtype_name(dtype))
    model = LlamaCpp(file, len(prompts), max(map(len, prompts)) + new)
    return lambda: model.generate(prompts, new)
