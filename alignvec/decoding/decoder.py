"""Decoder: rows of a static cache that decode side by side, each under its own mix."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignvec.coefficients import Coefficients
from alignvec.decoding.cache import RowCache
from alignvec.decoding.custom import custom_generate
from alignvec.decoding.generate import Blend, end_tokens, pad_token, padded, sequences, shares, stopping
from alignvec.decoding.mixes import Follow, Schedule, Values, resolve
from alignvec.decoding.prefill import Prefill, lent
from alignvec.decoding.prefixes import Prefixes
from alignvec.decoding.prompts import flat, require_room, token_ids, whole
from alignvec.decoding.rows import Row
from alignvec.decoding.runner import Runner
from alignvec.decoding.sampling import Sampler, Sampling
from alignvec.decoding.step import Forward, Graphs, Kind, Output, State
from alignvec.errors import AlignvecError
from alignvec.printable import quoted
from alignvec.standing import Reading

if TYPE_CHECKING:
    from alignvec.alignment import Alignment

GREEDY = Sampling()
_PLAIN = Reading((), None)  # of a model without vectors


class Decoder:
    """Decodes up to `max_batch` sequences at a time on a transformers causal language model.

    The model may be plain, have vectors attached, or have a mix materialised. A step, sampling included, takes every
    row from its last token to its next without a wait for the device; on CUDA it is one graph, captured once for each
    power of two of rows. Rows join and leave, change their mixes and their sampling without another capture.

    Keys and values are written under the mix that a row has at that time, and stay so: a later mix decodes over a past
    that an earlier one wrote. `recompute=True` writes them anew whenever a row's mix changes, at the cost of reading
    the row's text again. Keys and values that outlive a row (`prefix_bytes`) are found by tokens *and* mix.

    One thread at a time; any thread may call `Alignment.set`, `set_rows`, `materialise` and `restore` meanwhile, which
    rows without a mix of their own follow from their next step on. A row with one is refused while a mix is
    materialised.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int = 1,
        max_length: int = 2048,
        graphs: bool | None = None,
        fuse: bool | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        """Make room for the rows, and find out how the model can be run.

        Args:
            model: a causal language model on one device.
            max_batch: rows. A sequence takes one, and a blend of policies one for each policy.
            max_length: most tokens of a row, prompt included. Where the model has no more positions, or its rotary
                frequencies follow the longest row, a row has fewer, and a longer one is refused.
            graphs: capture steps as CUDA graphs; by default on CUDA devices.
            fuse: True: our own layers, which the Llama family has; False: the model's own forward; by default the
                former where the model computes the same.
            prefix_bytes: memory for keys and values of prompts and answers that later prompts may begin with.

        Raises:
            AlignvecError: an argument out of range, a model on several devices, that keeps more than keys and values
                (recurrent state), or of an architecture that neither way of running computes as its own forward does,
                or fewer `max_rows` of coefficients than `max_batch`.
        """
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_length", max_length, 2),
            ("prefix_bytes", prefix_bytes, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise AlignvecError(f"{name}={value!r} must be an integer of at least {least}")
        self.model = model
        self.max_batch, self.max_length = max_batch, max_length
        self._alignment: Alignment | None = getattr(model, "alignment", None)
        if self._alignment is not None and self._alignment.max_rows < max_batch:
            raise AlignvecError(
                f"max_batch={max_batch} does not fit the {self._alignment.max_rows} rows of coefficients; attach with "
                f"max_rows={max_batch} or more"
            )
        with self._reading() as reading:
            table = self._table(reading)
            self._runner = Runner(self.model, table, fuse, graphs, max_batch, max_length)
        with torch.inference_mode(False), torch.no_grad():
            self.cache = RowCache(self._runner.prompted, max_batch, self._runner.room)
            vocabulary = self.model.get_output_embeddings().weight.shape[0]
            self.state = State(self.cache, Sampler(max_batch, vocabulary, self.cache.lengths.device))
        self.prefixes = Prefixes(prefix_bytes)
        self._prefill = Prefill(self.model, self.cache, self.prefixes)
        self._rows: list[Row | None] = [None] * max_batch
        self._active = [0] * max_batch
        self._launched: list[tuple[list[Row], Output]] = []
        self._known = 0  # of these, the first ones whose tokens the rows have

    def __repr__(self) -> str:
        how = "fused layers" if self.fused else f"the model's own forward ({self.reason})"
        graphs = ", CUDA graphs" if self._runner.graphs else ""
        return f"Decoder({type(self.model).__name__}, {self.max_batch} x {self.max_length} tokens, {how}{graphs})"

    @property
    def fused(self) -> bool:
        """Whether our own layers run, and not the model's forward."""
        return self._runner.reason is None

    @property
    def reason(self) -> str:
        """Why they do not; empty where they do."""
        return self._runner.reason or ""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache of keys and values."""
        return self.cache.nbytes

    @property
    def free(self) -> int:
        """Rows that are free."""
        return self._rows.count(None)

    def join(
        self,
        input_ids: Tensor | Sequence[int],
        mix: Schedule | None = None,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int | None = None,
        recompute: bool = False,
    ) -> int:
        """Read a prompt into a free row; the next step decodes it together with the others.

        Args:
            input_ids: token ids [tokens], without padding.
            mix: coefficients by name; a list of such, one a generated token, whose last stays; or a function from the
                number of the generated token to one. By default what `Alignment.set` gives, also when it changes.
            sampling: how its tokens are chosen.
            max_new_tokens: steps after which the row stands still; by default as many as it has room for.
            recompute: write its keys and values anew whenever the mix changes.

        Returns:
            The row.

        Raises:
            AlignvecError: no free row, an empty prompt or one without room, a token id outside of the vocabulary, an
                unknown vector name, or a mix unlike that of the other rows where the model needs one for all.
        """
        prompt = flat(input_ids)
        limit = self._runner.room + 1 - len(prompt) if max_new_tokens is None else max_new_tokens
        (row,) = self.admit([prompt], [mix], [sampling], limit, recompute=recompute)
        return row

    @torch.no_grad()
    def admit(
        self,
        prompts: Sequence[Sequence[int]],
        mixes: Sequence[Schedule | None],
        samplings: Sequence[Sampling],
        limit: int,
        *,
        recompute: bool = False,
        weights: Sequence[float] | None = None,
    ) -> list[int]:
        """`join` for several prompts at once, read in as few forward passes as they fit.

        weights: add up the logits of these rows, which must be of one prompt, and let all take the same token.

        Raises:
            AlignvecError: as `join`, and weights that are no finite numbers, or not one for each of equal prompts;
                nothing is changed then.
        """
        free = [index for index, row in enumerate(self._rows) if row is None][: len(prompts)]
        if len(free) < len(prompts):
            raise AlignvecError(
                f"{len(prompts)} rows are needed and {len(free)} are free; make a decoder with more max_batch"
            )
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        prompts = [token_ids(prompt, vocabulary) for prompt in prompts]
        limit = whole(limit)
        for prompt in prompts:
            require_room(prompt, limit, self._runner, self.max_length)
        weights = None if weights is None else shares(weights, prompts)
        if limit < 1:
            raise AlignvecError(f"max_new_tokens={limit} must be at least 1")
        rows = []
        for number, (index, prompt, mix, sampling) in enumerate(zip(free, prompts, mixes, samplings, strict=True)):
            chosen = self._mix(mix, number, len(prompts))
            rows.append(Row(index, prompt, limit, sampling, chosen, recompute, len(weights or [0])))
        beside = [] if self._runner.rows_differ else self._going
        with self._held([*beside, *rows]) as (reading, now):
            self._ready(reading)
            self._require_alike(now)
            self._prefill.read(rows, now, reading.weights, self._table(reading))
        for row in rows:
            ids = torch.tensor(row.prompt)
            self.state.sampler.put(row.index, row.sampling, ids)
            self.state.tokens[row.index] = row.prompt[-1]
            self.state.group([row.index], [1.0])
            self._rows[row.index] = row
        if weights is not None:
            self.state.group(free, weights)
        return free

    @torch.no_grad()
    def launch(self) -> None:
        """Queue one step of all rows that have tokens left to generate; on CUDA without waiting for it.

        Raises:
            AlignvecError: there is no such row, the model is not what it was when the rows joined, rows have
                different mixes where it needs one for all, or a row has one of its own while a mix is materialised.
        """
        rows = self._going
        if not rows:
            raise AlignvecError("no row has tokens left to generate; join one first")
        with self._held(rows) as (reading, mixes):
            self._launch(rows, reading, mixes)

    def _launch(self, rows: list[Row], reading: Reading, mixes: Mapping[int, Values | None]) -> None:
        forward, graphs = self._ready(reading)
        self._require_alike(mixes)
        self._renew(rows, mixes, reading)
        self._activate({row.index for row in rows})
        count = rows[-1].index + 1
        if graphs is not None:  # few of them, each for a power of two of rows
            count = min(1 << (count - 1).bit_length(), self.max_batch)
        kind = Kind(count, max(row.policies for row in rows), self.state.sampler.variant(count))
        some = next(iter(mixes.values()))  # free rows have any
        own = [mixes.get(index, some) for index in range(count)]
        with lent(self._table(reading), own, apart=graphs is not None and self._runner.alike is None):
            (graphs or self.state).step(forward, kind)
        for row in rows:
            row.launched += 1
        self._launched.append((rows, Output(self.state.tokens[:count])))

    def collect(self) -> dict[int, int]:
        """Tokens by row of the oldest step launched and not yet collected, without rows that left; waits for it.

        Raises:
            AlignvecError: no step is on its way.
        """
        if not self._launched:
            raise AlignvecError("no step was launched; call launch() first")
        if not self._known:
            self._know(1)
        rows, output = self._launched.pop(0)
        self._known -= 1
        tokens = output.wait()
        return {row.index: tokens[row.index] for row in rows if self._rows[row.index] is row}

    def _know(self, steps: int) -> None:
        """Wait for the tokens of the first steps on their way, which the rows have from here on, collected or not."""
        for rows, output in self._launched[self._known : steps]:
            tokens = output.wait()
            for row in rows:
                row.tokens.append(tokens[row.index])
            self._known += 1

    def step(self) -> dict[int, int]:
        """One token for every row that has some left: `launch`, and `collect` of all that is on its way."""
        self.launch()
        tokens: dict[int, int] = {}
        while self._launched:
            tokens = self.collect()
        return tokens

    @property
    def going(self) -> bool:
        """Whether a row has tokens left to generate."""
        return bool(self._going)

    def taken(self, row: int) -> bool:
        """Whether there is a sequence in a row."""
        return self._rows[row] is not None

    @property
    def pending(self) -> int:
        """Steps that were launched and not collected."""
        return len(self._launched)

    def set_row(self, row: int, mix: Schedule | None, *, recompute: bool = False) -> None:
        """Give a row another mix, from its next token on; a schedule goes on by the number of the generated token.

        Earlier keys and values stay as they were written. recompute: write them anew, now and at later changes.

        Raises:
            AlignvecError: the row is free, the mix has an unknown vector, or another one is materialised; nothing is
                changed then.
        """
        own = self._row(row)
        chosen = self._mix(mix, 0, 1)
        with self._held([dataclasses.replace(own, mix=chosen)]):
            own.mix = chosen
        own.recompute = recompute

    def set_sampling(self, row: int, sampling: Sampling) -> None:
        """Choose a row's tokens in another way, from its next one on."""
        own = self._row(row)
        self._know(self.pending)
        own.sampling = sampling
        self.state.sampler.put(row, sampling, torch.tensor(own.text))

    def text(self, row: int) -> list[int]:
        """Token ids of a row, as far as the host has seen them: prompt and answer."""
        return self._row(row).text

    @torch.no_grad()
    def leave(self, row: int) -> None:
        """Free a row. With `prefix_bytes`, what it read and wrote is kept for prompts that begin with it."""
        own = self._row(row)
        if self.prefixes.capacity:
            self._prefill.keep(own)
        self.state.sampler.clear(row)
        self.state.group([row], [1.0])
        self.cache.lengths[row] = 0
        self._rows[row] = None
        self._activate({other.index for other in self._rows if other is not None and not other.ended})

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        mixes: Sequence[Schedule | None] | None = None,
        blend: Blend | None = None,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 20,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        recompute: bool = False,
    ) -> Tensor:
        """Answers to a batch of prompts, as `model.generate` returns them; greedy ones are the same tokens.

        Args:
            input_ids: [batch, tokens], padded on the left where attention_mask is 0.
            mixes: one for each sequence, as `join` takes them; by default what `set` or `set_rows` gives.
            blend: (mix, weight) of up to 8 policies: each sequence is decoded under all of them, and its tokens chosen
                by the weighted sum of their logits (MOD, arXiv 2406.18853; DeRa, 2402.02992, with weights 1 - c and c).
                Each policy takes a row of the decoder, and all rows share every read of the weights.
            sampling: how tokens are chosen; sequences draw different random numbers.
            eos_token_id: what ends a sequence; by default the model's, and -1 for nothing.
            pad_token_id: fills up answers that ended early; by default the model's.
            stop_strings, tokenizer: an answer ends when it completes one of these strings.
            streamer: a streamer of transformers; for one sequence.
            recompute: write keys and values anew whenever the mix of a row changes.

        Returns:
            int64 [batch, tokens + the longest answer].

        Raises:
            AlignvecError: as `join`; padding on the right, more sequences than free rows, a streamer for several.
        """
        if streamer is not None:
            if len(input_ids) != 1:
                raise AlignvecError(f"a streamer takes one sequence, not {len(input_ids)}; leave it out")
            streamer.put(input_ids.cpu())
        eos = end_tokens(self.model, eos_token_id)
        stop = stopping(eos, stop_strings, tokenizer)
        answers = sequences(
            self, input_ids, attention_mask, mixes, blend, sampling, max_new_tokens, stop, streamer, recompute
        )
        return padded(input_ids, answers, pad_token(self.model, eos) if pad_token_id is None else pad_token_id)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = (),
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        mixes: Sequence[Schedule | None] | None = None,
        blend: Blend | None = None,
        recompute: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """`model.generate(..., custom_generate=decoder)`: transformers prepares its options, the decoder decodes.

        `mixes`, `blend` and `recompute` are further arguments of that call. transformers keeps streamer and tokenizer
        from functions like this one: give the streamer to both, `custom_generate=functools.partial(decoder,
        streamer=streamer)`, and stop strings as `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.

        Raises:
            AlignvecError: an option of `generate` that the decoder has not (beams, further processors of logits, ...).
        """
        return custom_generate(
            self,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config or model.generation_config,
            streamer,
            mixes,
            blend,
            recompute,
            model_kwargs,
        )

    def forget(self) -> None:
        """Drop the keys and values kept for later prompts; needed after the model's weights were changed in place."""
        self.prefixes.clear()
        for row in self._rows:
            if row is not None:
                row.written = None  # nor are those of rows that are being decoded kept when these leave

    def _row(self, row: int) -> Row:
        own = self._rows[row] if 0 <= row < self.max_batch else None
        if own is None:
            raise AlignvecError(f"row {row} is free; join() says which row a prompt is in")
        return own

    @property
    def _going(self) -> list[Row]:
        """Rows that have tokens left to generate."""
        return [row for row in self._rows if row is not None and not row.ended]

    def _require_alike(self, mixes: Mapping[int, Values | None]) -> None:
        """Refuse rows of one step whose mixes differ, where the model cannot run them."""
        if self._runner.alike is not None and len(set(mixes.values())) > 1:
            raise AlignvecError(
                f"rows of one step have different mixes, and {type(self.model).__name__} cannot be decoded so: "
                f"{self._runner.alike}; give all rows one mix"
            )

    def _activate(self, rows: set[int]) -> None:
        active = [int(index in rows) for index in range(self.max_batch)]
        if active != self._active:
            self.state.active.copy_(torch.tensor(active, dtype=torch.int32), non_blocking=True)
            self._active = active

    def _renew(self, rows: Sequence[Row], mixes: Mapping[int, Values | None], reading: Reading) -> None:
        """Follow changes of mixes: read the text anew where that is asked for, else note that the past has several."""
        changed = [row for row in rows if row.written != (reading.weights, mixes[row.index])]
        stale = [row for row in changed if row.recompute]
        if stale:
            self._know(self.pending)
            self._prefill.read(stale, mixes, reading.weights, self._table(reading))
        for row in changed:
            if not row.recompute:
                row.written = None

    def _mix(self, mix: Schedule | None, number: int, batch: int) -> Follow | Callable[[int], Values] | None:
        if self._alignment is not None:
            return Follow(number, batch) if mix is None else resolve(self._alignment.table, mix)
        if mix is not None:
            raise AlignvecError(f"the model has no vectors, so a row cannot have the mix {quoted(mix)}")
        return None

    def _table(self, reading: Reading) -> Coefficients | None:
        """Where mixes go to; None while the weights hold all that there is."""
        return None if self._alignment is None or reading.mixes is None else self._alignment.table

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Reading]:
        """What the model computes with, read once and staying so: keys and values that are written within are of it."""
        with contextlib.nullcontext(_PLAIN) if self._alignment is None else self._alignment.held() as reading:
            if self._alignment is not getattr(self.model, "alignment", None):
                raise AlignvecError("vectors were attached or detached since this decoder was made; make a new one")
            yield reading

    @contextlib.contextmanager
    def _held(self, rows: Sequence[Row]) -> Iterator[tuple[Reading, dict[int, Values | None]]]:
        """The same, and the mix of each row's next step, by its index: each is asked for once."""
        own = [row.own() for row in rows]  # first, since functions of the user's may set and materialise
        with self._reading() as reading:
            yield reading, {row.index: row.under(reading, mix) for row, mix in zip(rows, own, strict=True)}

    def _ready(self, reading: Reading) -> tuple[Forward, Graphs | None]:
        changes = 0 if self._alignment is None else self._alignment.changes
        return self._runner.program(self.state, changes, self._table(reading))
