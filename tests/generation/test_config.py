"""Settings of generation."""

import json

from tests.helpers.checkpoints import TEXT_CONFIG


def test_a_generation_config_is_read_and_written_with_fields_it_does_not_know(tmp_path):
    from olmozoo.generation.config import GenerationConfig

    data = {
        "eos_token_id": [0, 5],
        "pad_token_id": 1,
        "max_new_tokens": 7,
        "temperature": 0.6,
        "transformers_version": "5",
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    assert GenerationConfig.from_folder(tmp_path, TEXT_CONFIG).to_dict() == data
