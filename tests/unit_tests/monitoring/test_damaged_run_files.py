"""Small files of runs and evaluations that are empty, cut, or of somebody else: one line that names the file, never a traceback."""

import json

import pytest

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.evaluation.identity import begin_run
from refine_titan.files.git_lfs import LFS_POINTER
from refine_titan.models.sizes import resolve_flavor
from refine_titan.monitoring.resumed_settings import resumed_settings
from refine_titan.monitoring.run_folder import write_run_files
from refine_titan.report.records import read_evaluation

DAMAGED = [b"", b"{", b"[]", b'{"refine": 3}', LFS_POINTER + b"v1\n", bytes(64), b'"\xff"']


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("name", ["config.json", "checkpoint/step-5/config.json"])
def test_a_run_that_resumes_names_the_file(tmp_path, name, content):
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    write_run_files(tmp_path, config.to_dict())
    (tmp_path / "checkpoint" / "step-5").mkdir(parents=True)
    (tmp_path / "checkpoint/step-5/config.json").write_text(json.dumps(resolve_flavor("delta_net", "debug").to_hf_config()))
    assert resumed_settings(config, 5) == []
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/{name}"):
        resumed_settings(config, 5)


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("read", [lambda folder: begin_run(folder, {"seed": 1}), read_evaluation])
def test_an_evaluation_that_resumes_and_its_report_name_the_file(tmp_path, read, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        read(tmp_path)
