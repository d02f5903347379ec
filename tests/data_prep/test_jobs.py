"""Keys of jobs, and what parts say of themselves, are what they always were: nobody's data are prepared again."""

import json
import pickle
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from data_prep import documents, encode
from data_prep.index import Shard
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.vocab import TokenSpace

CODEC = CodecDescription("none", "f", 4, 16, 24_000, 1_920, {})
SHARDS = [Shard(0, "items.parquet", 0, 3, "a"), Shard(1, "items.parquet", 1, 3, "b")]
SETTINGS = documents.PartSettings(
    tokenizer=Path("some/where/text_tokenizer.model"),
    tokenizer_fingerprint="t",
    space=TokenSpace(300, 1, 2, 4, 16),
    orders=("text-first", "audio-first"),
    shares=(0.05, 0.1),
    seed=7,
    corpus_codebooks=8,
)


def test_keys_of_sound():
    assert [job.key for job in encode.encode_jobs(SHARDS, Path("u"), CODEC, decoder="soundfile", trim=False)] == [
        "9f08f0ce6d31bb667388bd2b7e61597d7fe940046f4e05d84669520af8bee2d5",
        "c7a51c73691efdf3c9f8c4dd43999462f57e768e3af3281ee3cce0f63294492a",
    ]
    assert [job.key for job in encode.encode_jobs(SHARDS, Path("u"), CODEC, decoder="dali", trim=True)] == [
        "a1878422b96e75b734306e17b3ff549d3f428f68aaa16dce07d520ba1d78dab9",
        "4c51e71fc7aa83478a91315eba9f45d8d0739fe61f5e56d2b35d0d5109b8c971",
    ]


def test_keys_of_documents():
    units = documents.unit_jobs([Path("u0"), Path("u1")], ["k", "l"], ["012", "0"], Path("p"), SETTINGS)
    assert [job.key for job in units] == [
        "f6b276eea8b38a8ddc4bc2e5a630748de1e99ba86a52eab28becf67e22824524",
        "823d2c9f94bd68e049903dd2ee7edd26d678c8e140811ba78e3ea5b6dc2ed873",
    ]
    assert [job.key for job in documents.text_jobs(SHARDS, ["012", "0"], Path("p"), SETTINGS)] == [
        "ef7c063dad91ba332b675defd1bcbe4d703767e3bd470125f91628404284c7a2",
        "943b5c235c74c3a535f97f6fefb45bd312ff29cf634fadccb90e50afbae85a84",
    ]
    strings = documents._job(documents.RowGroup(Path("c"), 0), Path("p"), "k", 3, SETTINGS)
    assert strings.key == "e9eca16b7a4f7b3cca7fa7dad4f23354dbc6329105afb258503be76e88803c80"


def test_a_part_of_an_earlier_version_is_done(tmp_path):
    (job,) = documents.unit_jobs([tmp_path / "u"], ["k"], ["0"], tmp_path, SETTINGS)
    counts = {f"{side}.{what}": 0 for side in ("train", "valid", "test") for what in ("tokens", "documents")}
    more = {"key": job.key, "classes": [3, 2], "languages": {"en": [2, 1.5]}, "rejects": 0}
    facts = {**counts, "train.tokens": 5, "train.documents": 1, **more}
    save_file({"train.ids": np.zeros(5, np.int32)}, job.out, {"facts": json.dumps(facts)})
    assert documents.is_done(job)
    found = documents.part_facts(job.out)
    assert found == documents.PartFacts(
        job.key, {"train": 5, "valid": 0, "test": 0}, {"en": documents.Used(utterances=2, seconds=1.5)}, {}
    )
    assert documents.PartFacts.from_json(found.to_json()) == found


def test_jobs_reach_a_worker(tmp_path):
    jobs = [
        *encode.encode_jobs(SHARDS, tmp_path, CODEC, decoder="dali", trim=True),
        *documents.unit_jobs([tmp_path / "u"], ["k"], ["0"], tmp_path, SETTINGS),
        *documents.text_jobs(SHARDS, ["012", "0"], tmp_path, SETTINGS),
    ]
    assert pickle.loads(pickle.dumps(jobs)) == jobs
