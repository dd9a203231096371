"""Every family's files, in and out: byte-identical, complete, loaded by transformers; and refused with the name of what is wrong."""

import json

import jax
import numpy as np
import pytest
from helpers.checkpoints import quiet, tensors
from helpers.families import all_cases, one_a_family
from safetensors.torch import load_file, save_file

from mmalign_jax.errors import UserError
from mmalign_jax.hf import families
from mmalign_jax.hf.export import export
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.models.params import abstract_params

CASES = all_cases()


@pytest.mark.parametrize("name", CASES)
def test_import_then_export_is_the_same(tmp_path, name):
    case = CASES[name]
    base = case.write(tmp_path / "base", 3)
    config = read_config(base)
    params = load_params(base, config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
    table = families.of(config).names(config)
    reduced = [entry for leaf in table.entries for entry in leaf.names]
    assert len(set(reduced)) == len(reduced), "a name is used twice"
    out = export(params, base, tmp_path / "out")
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype and before[tensor].equal(after[tensor]), tensor
    for file in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).is_file(), file

    with quiet():
        model, info = type(case.load(base)).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info.get("mismatched_keys")
    del model
    for record in case.records:
        ours, theirs = case.inputs(base, record), case.inputs(out, record)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours), record.id
    # a second export, of what was exported, is the same again
    again = tensors(export(load_params(out, read_config(out)), out, tmp_path / "again"))
    assert all(before[tensor].equal(again[tensor]) for tensor in before)


@pytest.mark.parametrize("name", one_a_family())
def test_our_pixels_are_those_of_the_exported_processor(tmp_path, name):
    """Pixels are compared through the logits in the parity test; here, that an export's processor is read as the base's."""
    case = CASES[name]
    base = case.write(tmp_path / "base", 3)
    config = read_config(base)
    out = export(load_params(base, config), base, tmp_path / "out")
    (out / "processor_config.json").unlink()  # version 4 of transformers reads the other file
    first, second = load_processor(base, config), load_processor(out, config)
    assert (first.mean, first.std, first.traits) == (second.mean, second.std, second.traits)
    rng = np.random.default_rng(0)
    from PIL import Image

    for size in ((30, 50), (64, 21), (28, 28)):
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        np.testing.assert_array_equal(first.pictures.pixels([picture]), second.pictures.pixels([picture]))
        one, two = first.pictures.expand([size]), second.pictures.expand([size])
        assert one.text == two.text and one.tiles == two.tiles and one.features.tolist() == two.features.tolist()


@pytest.mark.parametrize("name", one_a_family())
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, name):
    base = CASES[name].write(tmp_path, 3)
    file = base / "model.safetensors"
    whole = load_file(file)
    config = read_config(base)
    used = {table_name for leaf in families.of(config).names(config).entries for table_name in leaf.names}
    table = families.of(config).names(config)
    named = sorted(key for key in whole if table.reduce(key) in used)
    victim = named[len(named) // 2]

    def refused(changed: dict) -> str:
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(UserError) as error:
            load_params(base, read_config(base))
        return str(error.value)

    without = {key: value for key, value in whole.items() if key != victim}
    assert table.reduce(victim) in refused(without)
    assert "vision_tower.sneaky" in refused(whole | {"vision_tower.sneaky": whole[victim].clone()})
    assert "stray.weight" in refused(whole | {"stray.weight": whole[victim].clone()})
    renamed = refused(without | {victim + "_2": whole[victim]})
    assert victim + "_2" in renamed or table.reduce(victim) in renamed
    assert victim in refused(without | {victim: whole[victim].flatten()[:-1].clone()})
    file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"pytorch_model.bin.*pickle"):
        load_params(base, config)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"model_type": "not_a_model"}))
    with pytest.raises(UserError, match="not_a_model"):
        read_config(base)
