"""Raw sources of every kind give the same records, and what is wrong with one is said where it stands."""

import json

import numpy as np
import pytest
import raw_sets
import tensorflow_datasets as tfds

from dreamlite_jax.data import sources
from dreamlite_jax.data.config import FieldsConfig, SourceConfig
from dreamlite_jax.data.sources import BadRecord, Record
from dreamlite_jax.data.sprites import builder
from dreamlite_jax.errors import UserError

PICTURES = [raw_sets.plain(i) for i in range(6)]


class Photos(tfds.core.GeneratorBasedBuilder):
    """A data set as the catalogue has them: an Image feature, captions in a sequence, written without TensorFlow."""

    name = "photos"
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "photo": tfds.features.Image(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, picture in enumerate(PICTURES):
            captions = [{"text": f"number {i}", "id": i}, {"text": "another", "id": 99}]
            yield i, {"photo": picture, "captions": captions}


FIELDS = FieldsConfig(image="photo", caption="captions.text")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    builder = Photos(data_dir=str(root), file_format=tfds.core.FileFormat.ARRAY_RECORD)
    builder.download_and_prepare()
    return root


def read_all(config):
    source = sources.open_source(config)
    return [source[i] for i in range(len(source))]


def test_a_folder_says_what_its_lines_say(tmp_path):
    rows = [
        {"image": "a.png", "caption": " a cat ", "id": "first"},
        {"source": "a.png", "instruction": "make it red", "target": "sub/b.png", "mask": "m.png"},
    ]
    raw_sets.write_rows(tmp_path, rows)
    (tmp_path / "sub").mkdir()
    for name, content in {"a.png": b"A", "sub/b.png": b"B", "m.png": b"M"}.items():
        (tmp_path / name).write_bytes(content)
    assert read_all(SourceConfig(str(tmp_path), kind="folder")) == [
        Record("first", "generate", "a cat", b"A"),
        Record("sub/b.png", "edit", "make it red", b"B", b"A", b"M"),
    ]


def test_fields_have_the_names_that_the_config_gives(tmp_path):
    (tmp_path / "x.png").write_bytes(b"X")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"file": {"path": "x.png"}, "texts": ["one", "two"]}) + "\n\n")
    fields = FieldsConfig(image="file.path", caption="texts")
    (record,) = read_all(SourceConfig(str(tmp_path), kind="folder", name="rows.jsonl", fields=fields))
    assert (record.text, record.target, record.id) == ("one", b"X", "x.png")


def test_shards_and_data_sets_give_what_a_folder_gives(tmp_path, photos):
    rows = [{"image": picture, "caption": f"number {i}"} for i, picture in enumerate(PICTURES)]
    raw_sets.write_shards(tmp_path, rows, shards=4)
    shards = read_all(SourceConfig(str(tmp_path), kind="array_record"))
    dataset = read_all(SourceConfig(str(photos), kind="tfds", name="photos", fields=FIELDS))
    for records in (shards, sorted(dataset, key=lambda record: record.text)):
        assert [(r.task, r.text, r.target) for r in records] == [
            ("generate", f"number {i}", picture) for i, picture in enumerate(PICTURES)
        ]
    assert shards[5].id == "set-00003-of-00004.array_record[1]"


def test_a_part_of_a_split_and_a_version_can_be_named(photos):
    whole = read_all(SourceConfig(str(photos), kind="tfds", name="photos:1.2.0", fields=FIELDS))
    part = read_all(SourceConfig(str(photos), kind="tfds", name="photos", split="train[2:4]", fields=FIELDS))
    assert [r.target for r in part] == [r.target for r in whole[2:4]]


def test_sprites_come_through_the_same_door(tmp_path):
    builder.prepare(tmp_path, "edit", 64, {"train": 8, "validation": 8, "heldout": 8})
    records = read_all(SourceConfig(str(tmp_path), name="edit_64", split="validation"))
    expected = builder.open_split(tmp_path, "edit", 64, "validation")
    assert [(r.task, r.source, r.target) for r in records] == [("edit", e["source"], e["target"]) for e in expected]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{oops", '{"image'], r"metadata.jsonl line 1: is not JSON"),
        (["", '["a"]'], r"line 2: is a list; it must be an object"),
        (['{"image": "a"}'], r"line 1: no field 'caption'; a record has image and caption, or source, instruction"),
        (['{"source": "a", "target": "b", "caption": "c"}'], r"line 1: no field 'instruction'"),
        (
            ['{"photo": "a", "words": "b"}'],
            r"no field 'image', 'caption'; .* its fields are 'photo', 'words'; .*fields.cap",
        ),
        (['{"photo": "a"}', '{"words": "b"}'], r"line 1: no field 'image', 'caption'; .* fields are 'photo', 'words'"),
        (['{"file_name": "a", "texts": "b"}'], r"line 1: no field 'caption'; a record has file_name and caption"),
        ([""], "has no records"),
    ],
)
def test_a_wrong_line_of_a_jsonl_is_named(tmp_path, lines, says):
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=says):
        sources.open_source(SourceConfig(str(tmp_path), kind="folder"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"path": "/nowhere"}, "source /nowhere: no such folder"),
        ({"kind": "latents"}, "has kind latents; raw pictures come from one of sprites, tfds, array_record, folder"),
        ({"kind": "folder", "name": ""}, r"metadata.jsonl: no such file"),
        ({"kind": "array_record", "name": "x"}, r"no file x\*.array_record"),
        ({"name": ""}, "has no name; kind tfds needs one"),
        ({"name": "fotos"}, "no prepared data set 'fotos'; known are: photos/1.2.0"),
        ({"name": "photos:9.9.9"}, "no prepared data set 'photos:9.9.9'"),
        ({"split": "test"}, "has no split 'test'; its splits are train"),
        (
            {"fields": FieldsConfig()},
            r"no field 'image', 'caption'; .* its fields are 'captions', 'photo'; .*source.fields.caption",
        ),
        ({"fields": FieldsConfig(image="photo", caption="captions.texts")}, "no field 'captions.texts'"),
    ],
)
def test_a_source_that_is_not_as_described_is_refused(photos, changes, says):
    settings = {"path": str(photos), "kind": "tfds", "name": "photos", "fields": FIELDS} | changes
    with pytest.raises(UserError, match=says):
        sources.open_source(SourceConfig(**settings))


def test_data_sets_that_cannot_be_read_at_random_are_refused(photos, tmp_path):
    folder = tmp_path / "photos" / "1.2.0"
    folder.mkdir(parents=True)
    for path in (photos / "photos" / "1.2.0").glob("*.json"):
        (folder / path.name).write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r'stored as tfrecord; prepare it with .*file_format="array_record"'):
        sources.open_source(SourceConfig(str(tmp_path), kind="tfds", name="photos", fields=FIELDS))


def test_bad_records_are_bad_alone(tmp_path):
    rows = [
        {"image": PICTURES[0], "caption": "fine"},
        {"image": PICTURES[0], "caption": "  "},
        {"image": PICTURES[0]},
        {"image": PICTURES[0], "caption": 7},
        {"image": PICTURES[0], "caption": b"\xff\xfe"},
        b"\xc1 no msgpack",
    ]
    raw_sets.write_shards(tmp_path, rows, shards=1)
    source = sources.open_source(SourceConfig(str(tmp_path), kind="array_record"))
    assert source[0].text == "fine"
    says = ["text is empty", "no field 'caption'", "text is 7, a int", "is not UTF-8", "record or its shard is damaged"]
    for index, expected in enumerate(says, 1):
        with pytest.raises(BadRecord, match=expected):
            source[index]
    assert source.name(5) == "set-00000-of-00001.array_record[5]"

    raw_sets.write_rows(tmp_path, [{"image": "gone.png", "caption": "x"}, {"image": 3, "caption": "x"}])
    folder = sources.open_source(SourceConfig(str(tmp_path), kind="folder"))
    with pytest.raises(BadRecord, match=r"picture gone.png: No such file"):
        folder[0]
    with pytest.raises(BadRecord, match="picture is 3; it must be the path"):
        folder[1]
    assert folder.name(1) == "metadata.jsonl line 2"


BROKEN = [
    (r'{"image": "a.png", "caption": "a car \ud83d here"}', r"half of a surrogate pair at character 7: 'a car "),
    (r'{"image": "a.png", "caption": "\udc00\ud800"}', r"half of a surrogate pair at character 1"),
    (r'{"image": "a.png", "caption": "red\u0000car"}', r"NUL at character 4"),
    (r'{"image": "a.png", "caption": null}', r"field 'caption' is null"),
    (r'{"image": "a.png", "caption": []}', r"field 'caption' is null or empty"),
    (r'{"image": "a.png", "caption": ""}', r"text is empty"),
    (r'{"image": "a.png", "caption": {"en": "x"}}', r"text is .*, a dict; it must be words"),
    (r'{"image": "a.png"}', r"no field 'caption'"),
    (r'{"image": "a\u0000.png", "caption": "x"}', r"picture a.*null"),
    (r'{"image": "\ud83d.png", "caption": "x"}', r"picture "),
    (r'{"image": "a.png", "caption": "x", "id": "\ud83d"}', r"id has half of a surrogate pair"),
    (r'{"image": 7, "caption": "x"}', r"picture is 7; it must be the path"),
    (r'{"image": ".", "caption": "x"}', r"picture \.: Is a directory"),
    (r'{"image": "a.png", "caption"', r"is not JSON"),
    (r"[1, 2]", r"is a list"),
    ("[" * 100_000, r"is not JSON"),
    (b'{"image": "a.png", "caption": "\xff\xfe"}', r"is not JSON"),
    (r'{"source": "a.png", "instruction": "redder", "target": null}', r"field 'target' is null"),
]


@pytest.mark.parametrize(("line", "says"), BROKEN, ids=range(len(BROKEN)))
def test_one_broken_line_is_one_bad_record(tmp_path, line, says):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    good = b'{"image": "a.png", "caption": "a fine \xf0\x9f\x9a\x97 car"}'
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([good, line, good]))
    source = sources.open_source(SourceConfig(str(tmp_path), kind="folder"))
    assert len(source) == 3 and source[0] == source[2]
    with pytest.raises(BadRecord, match=says):
        source[1]


def test_a_line_whose_caption_is_null_does_not_hide_the_key_from_all(tmp_path):
    """Every caption is null: the schema is right, each record is bad."""
    raw_sets.write_rows(tmp_path, [{"image": "a.png", "caption": None}] * 2)
    source = sources.open_source(SourceConfig(str(tmp_path), kind="folder"))
    with pytest.raises(BadRecord, match="field 'caption' is null"):
        source[0]


def test_names_of_the_datasets_library_are_found(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    raw_sets.write_rows(tmp_path, [{"file_name": "a.png", "text": "a cat"}, {"file_name": "a.png"}])
    source = sources.open_source(SourceConfig(str(tmp_path), kind="folder"))
    assert source[0] == Record("a.png", "generate", "a cat", b"A")
    raw_sets.write_rows(tmp_path, [{"file_name": "a.png", "text": "a cat", "caption": "a dog"}])
    assert read_all(SourceConfig(str(tmp_path), kind="folder"))[0].text == "a dog"  # the name that was asked for
    rows = [{"image": b"A", "text": "a cat"}]
    raw_sets.write_shards(tmp_path / "shards", rows, shards=1)
    assert read_all(SourceConfig(str(tmp_path / "shards"), kind="array_record"))[0].text == "a cat"
    raw_sets.write_shards(tmp_path / "other", [{"img": b"A", "words": "a cat"}], shards=1)
    with pytest.raises(
        UserError, match=r"no field 'image', 'caption'; .* its fields are 'img', 'words'; .*fields.capt"
    ):
        sources.open_source(SourceConfig(str(tmp_path / "other"), kind="array_record"))


def test_stamps_tell_which_pictures_a_record_has(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PICTURES[0])
    rows = [{"image": "a.png", "caption": "x"}, {"source": "a.png", "instruction": "x", "target": "b.png"}]
    raw_sets.write_rows(tmp_path, [*rows, {"image": "gone.png", "caption": "x"}])
    source = sources.open_source(SourceConfig(str(tmp_path), kind="folder"))
    assert [[stamp.name for stamp in source.stamps(i)] for i in (0, 1)] == [["a.png"], ["b.png", "a.png"]]
    assert source.stamps(0)[0].size == len(PICTURES[0])
    with pytest.raises(BadRecord, match=r"gone.png'?: No such file"):
        source.stamps(2)


def test_missing_and_truncated_shards_are_left_out_by_name(tmp_path, photos):
    rows = [{"image": PICTURES[i], "caption": f"number {i}"} for i in range(6)]
    paths = raw_sets.write_shards(tmp_path, rows, shards=3)
    paths[0].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    source = sources.open_source(SourceConfig(str(tmp_path), kind="array_record"))
    assert [source[i].text for i in range(len(source))] == ["number 2", "number 3"]
    assert source.missing[0] == paths[0].name and source.missing[1].startswith(f"{paths[2].name} (cannot be opened")
    assert source.missing_share == pytest.approx(2 / 3)
    for path in paths[1:]:
        path.unlink()
    with pytest.raises(UserError, match="no file"):
        sources.open_source(SourceConfig(str(tmp_path), kind="array_record"))


def test_a_missing_shard_of_a_data_set_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.writer, "_get_number_shards", lambda *args, **kwargs: 3, raising=False)
    config = tfds.download.DownloadConfig(num_shards=3)
    builder = Photos(data_dir=str(tmp_path), file_format=tfds.core.FileFormat.ARRAY_RECORD)
    builder.download_and_prepare(download_config=config)
    whole = read_all(SourceConfig(str(tmp_path), kind="tfds", name="photos", fields=FIELDS))
    shards = sorted((tmp_path / "photos" / "1.2.0").glob("*array_record*"))
    assert len(shards) == 3
    shards[1].unlink()
    source = sources.open_source(SourceConfig(str(tmp_path), kind="tfds", name="photos", fields=FIELDS))
    assert source.missing == [shards[1].name] and source.missing_share == pytest.approx(2 / 6)
    assert [source[i].target for i in range(len(source))] == [r.target for r in whole[:2] + whole[4:]]
    assert source.name(2) == "photos train[4]"
