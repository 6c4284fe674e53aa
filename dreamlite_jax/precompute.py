"""Encodes a data set once: python -m dreamlite_jax.precompute --config configs/precompute.py:t2i_64 --output DIR.

Writes latents and text states as shards. Run again it holds every record to the source: what changed is encoded again,
the rest is kept, and what it found is said. Training sees all of a set or none. Several hosts (or processes) share the
work through --host I --hosts N, each taking every N-th shard; run all of them again after a change. Records that cannot
be used are left out and named in DIR/bad_records/host_I.jsonl.
"""

import functools
import itertools
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamlite_jax import cli, decoding
from dreamlite_jax.assets import vae_path
from dreamlite_jax.config import to_dict
from dreamlite_jax.data import encoding, transforms
from dreamlite_jax.data import latents as latent_data
from dreamlite_jax.data.buckets import check_sizes
from dreamlite_jax.data.encoders import text_identity
from dreamlite_jax.data.fit import check_limits, summary
from dreamlite_jax.data.kept import Entry, Kept, Manifest, content_digest, digest
from dreamlite_jax.data.made_of import MADE_OF, is_older, plain, refuse_foreign, refuse_other, settings_digest
from dreamlite_jax.data.mixture import source_sizes
from dreamlite_jax.data.progress import TELL_EVERY, Progress, ahead, say
from dreamlite_jax.data.reading import BadRecords, log_path
from dreamlite_jax.data.records import BadRecord, Stamp
from dreamlite_jax.data.sources import Source, open_source
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json, write_json
from dreamlite_jax.model_folder import load_vae
from dreamlite_jax.tensor_files import sha256_of
from dreamlite_jax.text.encoder import PromptRequest, PromptTooLong
from dreamlite_jax.text.load import encoder_sha256
from dreamlite_jax.training.config import PrecomputeConfig, load_config


class Seen(NamedTuple):
    """A record that was looked at. `content` is its `kept.content_digest`."""

    index: int
    id: str
    content: str
    bucket: int

    @property
    def entry(self) -> Entry:
        return Entry(self.id, self.content, self.bucket)


def precompute(config: PrecomputeConfig, output: Path, host: int = 0, hosts: int = 1) -> None:
    """Makes what this host's shards lack of the source; whoever sees all of them as they should be writes `info.json`.

    Raises:
      UserError: the source or an encoder is not there or does not fit, the folder is another's, too many records cannot
        be used, latents are no numbers, or the source changed while it was read.
    """
    cli.check_writable("--output", output)
    if not 0 <= host < hosts:
        raise UserError(f"--host {host} is not below --hosts {hosts}")
    refuse_foreign(output)
    source = open_source(config.source)
    sizes = source_sizes(config.buckets, [source], "config.buckets")
    vae_file = vae_path(config.vae)
    vae_config, vae_params = load_vae(vae_file)
    check_sizes("config.buckets", sizes, vae_config.downsampling, "the autoencoder")
    made_of = {
        "config": to_dict(config),
        "vae_sha256": sha256_of([vae_file]),
        "vae": to_dict(vae_config),
        "text": text_identity(config.text, encoder_sha256(config.text)),
        "decoding": decoding.DECODING,
    }
    refuse_other(output, made_of)
    if is_older(output):
        say(
            f"{output}: made by an older version, which did not write down what its records come from: it cannot be "
            "held to its source, and is left as it is. Training reads it; to be sure, precompute into another folder"
        )
        return
    Run(config, output, host, hosts, source, sizes, made_of, (vae_config, vae_params)).run()


class Run:
    """One host's part of the work on a folder."""

    def __init__(self, config, output, host, hosts, source, sizes, made_of, vae):
        self.config: PrecomputeConfig = config
        self.output: Path = output
        self.source: Source = source
        self.host, self.hosts, self.sizes, self.made_of, self._vae = host, hosts, sizes, made_of, vae
        self.count = -(-len(source) // config.shard_size)
        self.mine = range(host, self.count, hosts)
        self.kept = Kept(output, settings_digest(made_of))
        self._made: dict[int, str] = {}  # the stems of this host's shards that are as the source has them
        log_path(output, host).unlink(missing_ok=True)  # what it named may have been mended
        self.bad = BadRecords(log_path(output, host), config.max_bad_fraction, len(source))

    @functools.cached_property
    def encoder(self) -> encoding.Encoder:
        text = encoding.text_encoder(self.config.text)
        return encoding.Encoder(*self._vae, text, self.config.batch_size)

    def run(self) -> None:
        self.bad.shards(self.config.source.path, self.source.missing, self.source.missing_share)
        before = self._info()
        state = self._source_state() if self.hosts > 1 else ""
        seen = self._look([i for shard in self.mine for i in self._chunk(shard)], told=True)
        if self.hosts > 1 and self._source_state() != state:
            raise UserError(f"source {self.config.source.path} changed while it was read; run this again")
        shards = {shard: self._usable(self._of_shard(seen, shard)) for shard in self.mine}
        self._tell(before, [entry.entry for entries, *_ in shards.values() for entry in entries])
        todo = [shard for shard, found in shards.items() if not self._is_made(shard, *found)]
        if todo:
            self._claim()
            work = sum(entry.content not in self.kept for shard in todo for entry in shards[shard][0])
            progress = Progress(work, len(self.source))
            for shard in todo:
                self._make(shard, *shards[shard], progress)
        stems = {shard: self._made[shard] for shard in self.mine}
        if self.hosts > 1:
            for shard, stem in stems.items():
                self.kept.check_off(shard, stem, state)
            stems |= self._of_others(state)
        if len(stems) == self.count:
            self._complete([stems[shard] for shard in range(self.count)], before)
        if self.bad.count:
            say(f"left out {self.bad.count} records; they are named in {self.bad.path}")

    # --- what the source says

    def _chunk(self, shard: int) -> range:
        size = self.config.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.source)))

    def _of_shard(self, seen: Sequence[Seen], shard: int) -> list[Seen]:
        chunk = self._chunk(shard)
        indices = [entry.index for entry in seen]
        return list(seen[np.searchsorted(indices, chunk.start) : np.searchsorted(indices, chunk.stop)])

    def _look(self, indices: Sequence[int], told: bool = False) -> list[Seen]:
        """Reads these records, without decoding; with `told` it says what it found, and counts those that are bad."""
        found, bad, pictures = [], [], np.zeros((len(indices), 2), np.int32)
        started = said = time.monotonic()
        with ThreadPoolExecutor(self.config.threads) as pool:
            for row, result in enumerate(ahead(pool, self._look_at, indices, 64 * self.config.threads)):
                if isinstance(result, BadRecord):
                    bad.append((indices[row], result))
                else:
                    entry, pictures[row] = result
                    found.append(entry)
                if told and time.monotonic() - said > TELL_EVERY:
                    said = time.monotonic()
                    say(f"looked at {row + 1}/{len(indices)} records  {(row + 1) / (said - started):.0f}/s")
        if told and len(indices):
            if self.config.source.form != "sprites":
                of = f"{len(indices):,} of {len(self.source):,} records" if self.hosts > 1 else ""
                lines = summary(
                    self.sizes, pictures, self.config.source, lambda row: self.source.name(indices[row]), of
                )
                print("\n".join(lines), file=sys.stderr, flush=True)
            self.bad.read(len(indices))
            for index, error in bad:
                self._leave_out(index, error)
        return found

    def _look_at(self, index: int) -> tuple[Seen, tuple[int, int]] | BadRecord:
        try:
            record = self.source[index]
            size = transforms.picture_size(record.target)
            bucket = check_limits(size, self.sizes, self.config.source)
            return Seen(index, record.id, content_digest(self.kept.settings, record), bucket), size
        except BadRecord as error:
            return error

    def _usable(self, seen: Sequence[Seen]) -> tuple[list[Seen], dict[str, str], set[str]]:
        """Records that can be tried, in the order of a shard, and the contents among the others that words or decoding
        speak against."""
        usable, refused, unreadable = [], {}, set()
        for entry in sorted(seen, key=lambda entry: (entry.bucket, entry.index)):
            if entry.content in self.kept.refused:
                refused[entry.content] = self.kept.refused[entry.content]
                self._leave_out(entry.index, refused[entry.content])
            elif entry.content in self.kept.unreadable and isinstance(error := self._load(entry), BadRecord):
                unreadable.add(entry.content)
                self._leave_out(entry.index, error)
            else:
                usable.append(entry)
        return usable, refused, unreadable

    def _leave_out(self, index: int, error: Exception | str) -> None:
        source = self.config.source
        self.bad.add(f"{source.path} {source.name}".strip(), self.source.name(index), str(error))

    def _source_state(self) -> str:
        """Changes with every file of the source, as far as the file system tells."""
        with ThreadPoolExecutor(self.config.threads) as pool:
            stamps = list(pool.map(self._stamps, range(len(self.source))))
        return digest([Stamp.of(path) for path in self.source.files], stamps)

    def _stamps(self, index: int) -> Sequence[Stamp] | None:
        try:
            return self.source.stamps(index)
        except BadRecord:
            return None

    # --- shards

    def _manifest(self, entries: Iterable[Entry], refused: dict[str, str], unreadable: Iterable[str]) -> Manifest:
        return Manifest(self.kept.settings, tuple(entries), dict(sorted(refused.items())), tuple(sorted(unreadable)))

    def _is_made(self, shard: int, usable: list[Seen], refused: dict[str, str], unreadable: set[str]) -> bool:
        manifest = self._manifest((entry.entry for entry in usable), refused, unreadable)
        stem = manifest.stem(shard)
        found = self.kept.manifest(stem)
        if found is None or any(entry.content not in self.kept for entry in usable):
            return False
        if found != manifest:  # other records were left out beside the same ones
            self.kept.describe(stem, manifest)
        self._made[shard] = stem
        return True

    def _claim(self) -> None:
        """Says whose folder this is, and that it is not whole."""
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / latent_data.INFO).unlink(missing_ok=True)
        if not (self.output / MADE_OF).is_file() or read_json(self.output / MADE_OF) != plain(self.made_of):
            write_json(self.output / MADE_OF, self.made_of)

    def _make(
        self, shard: int, usable: list[Seen], refused: dict[str, str], unreadable: set[str], progress: "Progress"
    ) -> None:
        """Writes one shard."""
        refused, unreadable, written = dict(refused), set(unreadable), []

        def records() -> Iterator[bytes]:
            for _, group in itertools.groupby(usable, key=lambda entry: entry.bucket):
                for entry, packed in self._records(list(group), refused, unreadable, progress):
                    written.append(entry.entry)
                    yield packed

        temporary = latent_data.write_records(self.output / f"latents-{shard:05d}.array_record", records())
        refuse_other(self.output, self.made_of, begun=True)  # by another process meanwhile
        self._made[shard] = self.kept.put(shard, self._manifest(written, refused, unreadable), temporary)

    def _records(
        self, entries: list[Seen], refused: dict[str, str], unreadable: set[str], progress: "Progress"
    ) -> Iterator[tuple[Seen, bytes]]:
        """Packed examples of one bucket, those that are kept among those that are encoded, in batches of the latter."""
        waiting: list[tuple[Seen, transforms.Item | None]] = []
        fresh = 0
        with ThreadPoolExecutor(self.config.threads) as pool:
            load = lambda entry: None if entry.content in self.kept else self._load(entry)  # noqa: E731
            for entry, item in zip(entries, ahead(pool, load, entries, 2 * self.config.batch_size), strict=True):
                if isinstance(item, BadRecord):
                    unreadable.add(entry.content)
                    self._leave_out(entry.index, item)
                    progress.skip()
                    continue
                waiting.append((entry, item))
                fresh += item is not None
                if fresh == self.config.batch_size:
                    yield from self._encoded(waiting, refused, progress)
                    waiting, fresh = [], 0
        yield from self._encoded(waiting, refused, progress)

    def _encoded(
        self, waiting: list[tuple[Seen, transforms.Item | None]], refused: dict[str, str], progress: "Progress"
    ) -> Iterator[tuple[Seen, bytes]]:
        fresh = [(entry, item) for entry, item in waiting if item is not None]
        left_out, states = self.encoder.prompts([item for _, item in fresh])
        for row, error in left_out.items():
            entry = fresh[row][0]
            refused[entry.content] = self._too_long(error)
            self._leave_out(entry.index, refused[entry.content])
            progress.skip()
        fresh = [pair for row, pair in enumerate(fresh) if row not in left_out]
        examples = self.encoder.examples([item for _, item in fresh], states)
        made = {}
        for (entry, _), example in zip(fresh, examples, strict=True):
            where = f"source {self.config.source.path} {self.source.name(entry.index)} ({entry.id})"
            latent_data.check_range(
                example, where, "the autoencoder or its scaling_factor does not suit these pictures"
            )
            made[entry.index] = latent_data.pack(example)
        progress.add(list(made.values()))
        for entry, item in waiting:
            if item is not None:
                if entry.index in made:
                    yield entry, made[entry.index]
            elif (packed := self.kept.record(entry.entry)) is not None:
                yield entry, packed
            elif isinstance(item := self._load(entry), BadRecord):
                raise UserError(f"source {self.config.source.path} changed while it was read; run this again")
            else:
                yield entry, latent_data.pack(self.encoder.examples([item], self.encoder.prompts([item])[1])[0])

    def _too_long(self, error: UserError) -> str:
        setting = f"config.text.max_length, now {self.config.text.max_length}, sets the limit"
        return f"{error}; {setting}" if isinstance(error, PromptTooLong) else str(error)

    def _load(self, entry: Seen) -> transforms.Item | BadRecord:
        """The record, decoded."""
        try:
            record = self.source[entry.index]
            changed = content_digest(self.kept.settings, record) != entry.content
        except BadRecord:
            changed = True
        if changed:
            name = self.source.name(entry.index)
            raise UserError(f"source {self.config.source.path} {name} changed while it was read; run this again")
        try:
            levels = self.config.source.changed_levels
            return transforms.item(record, self.sizes[entry.bucket], changed_levels=levels)
        except BadRecord as error:
            return error

    # --- the whole folder

    def _of_others(self, state: str) -> dict[int, str]:
        """The shards of other hosts that are as the source has them; says which are not."""
        self.kept.reload()
        found, absent = {}, []
        for shard in set(range(self.count)) - set(self.mine):
            if stem := self.kept.checked_off(shard, state):
                found[shard] = stem
                continue
            usable, refused, unreadable = [], {}, set()
            seen = self._look(self._chunk(shard)) if self.kept.has_shard(shard) else []
            for entry in sorted(seen, key=lambda entry: (entry.bucket, entry.index)):
                if entry.content in self.kept.refused:
                    refused[entry.content] = self.kept.refused[entry.content]
                elif entry.content in self.kept.unreadable:
                    unreadable.add(entry.content)
                else:
                    usable.append(entry.entry)
            stem = self._manifest(usable, refused, unreadable).stem(shard)
            if seen and self.kept.manifest(stem) is not None:
                found[shard] = stem
            else:
                absent.append(shard)
        if absent:
            (self.output / latent_data.INFO).unlink(missing_ok=True)
            say(
                f"{self.output}: not complete: of {self.count} shards {len(absent)} are missing or of another state of "
                f"the source, such as number {min(absent)} of --host {min(absent) % self.hosts}; run those hosts again"
            )
        return found

    def _info(self) -> dict[str, Any]:
        path = self.output / latent_data.INFO
        return read_json(path) if path.is_file() else {}

    def _complete(self, stems: list[str], before: dict[str, Any]) -> None:
        entries, several = self.kept.entries(stems), len(self.sizes) > 1
        info = {
            "format": latent_data.FORMAT,
            "shards": self.count,
            "files": [self.kept.shard(stem).name for stem in stems],
            "records": len(self.source),
            "examples": len(entries),
            "digest": digest(self.kept.settings, stems),
            **self.made_of,
        }
        if several:
            info |= {"buckets": self.sizes, "bucket_table": f"buckets-{info['digest'][:12]}.npy"}
        table = np.asarray([entry.bucket for entry in entries], np.uint16)
        null = {name: before[name] for name in ("null_tail", "null_states") if name in before}
        whole = before and before == plain(info) | null and self._info()
        if not whole or (several and not is_table(self.output / info["bucket_table"], table)):
            self._claim()
            if several:
                write_array(self.output / info["bucket_table"], table)
            if not null:
                states, mask = self.encoder.text.encode([PromptRequest("null", "")])
                null = {"null_tail": self.encoder.text.null_tail, "null_states": states[0, : int(mask[0].sum())]}
            latent_data.write_info(self.output, info | {"null_tail": null["null_tail"]}, null["null_states"])
        self.kept.clear(stems, [info["bucket_table"]] if several else [], alone=self.hosts == 1)
        say(f"{self.output}: complete, {len(self.source)} records")

    def _tell(self, before: dict[str, Any], entries: Sequence[Entry]) -> None:
        """Says what changed since the folder was last whole, or what is left to do."""
        fresh = Counter(entry.id for entry in entries if entry.content not in self.kept)
        new = sum(fresh.values())
        old = self.kept.entries(Path(name).stem for name in before.get("files", ()))
        if self.hosts > 1 or not old:
            if new < len(entries):
                say(f"{self.output}: {len(entries) - new} records are there, {new} are to be encoded")
            return
        gone = Counter(entry.content for entry in old)
        gone.subtract(entry.content for entry in entries)
        lost = Counter()
        for entry in old:
            if gone[entry.content] > 0:
                gone[entry.content] -= 1
                lost[entry.id] += 1
        changed = sum(min(count, lost[id]) for id, count in fresh.items())
        say(
            f"{self.output}: {changed} records changed, {new - changed} added, {sum(lost.values()) - changed} removed, "
            f"{len(entries) - new} kept"
        )


def write_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # several hosts may get here at the same moment
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)


def is_table(path: Path, expected: np.ndarray) -> bool:
    """Whether there is such an array in a file."""
    try:
        return np.array_equal(np.load(path), expected)
    except Exception:  # a damaged file raises nearly anything
        return False


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = cli.documented("dreamlite_jax.precompute", __doc__)
    cli.add_config(parser, required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=1)
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    precompute(load_config(args.config, overrides, PrecomputeConfig), args.output, args.host, args.hosts)
    return 0


if __name__ == "__main__":
    cli.run(main)
