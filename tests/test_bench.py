"""The benchmark measures what it says; how quick that is, is not for a test."""

import pytest
import tiny

from dreamlite_jax import bench
from dreamlite_jax.data.config import BucketConfig
from dreamlite_jax.errors import UserError


@pytest.mark.parametrize(("flag", "work"), [("--threads=3", "3 threads"), ("--processes=1", "1 processes")])
def test_it_reads_pictures_for_a_while_and_says_how_many(capsys, flag, work):
    assert bench.main(["--what", "data", "--pictures", "8", "--seconds", "0.1", flag]) == 0
    said = capsys.readouterr().out
    assert f"images/s ({work}" in said
    assert float(said.split()[1]) > 0


def test_its_pictures_are_jpegs_of_256_px(tmp_path):
    data = bench.photographs_config(bench.write_photographs(tmp_path / "set", 3), 2)
    assert data.buckets == BucketConfig(256) and len(list((tmp_path / "set").glob("*.jpg"))) == 3
    assert all(10e3 < path.stat().st_size < 60e3 for path in (tmp_path / "set").glob("*.jpg"))
    assert next(bench.batches_of(data)) == 2


def test_latents_are_no_pictures(tmp_path):
    config = tiny.write_config(tmp_path / "config.py", tiny.train_config(tmp_path))
    with pytest.raises(UserError, match="--config reads precomputed latents"):
        bench.main(["--what", "data", "--config", str(config)])
