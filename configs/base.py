"""Every setting at its default. Other config files start from this one.

The hyper-parameters of all objectives stand in `config.objective` as empty places, so that `--config.objective.beta=0.2` works on
the command line; an empty place means the default of the objective that `config.objective.name` names.
"""

from ml_collections import ConfigDict, config_dict

from mmalign_jax import config, losses


def get_config() -> ConfigDict:
    out = ConfigDict(config.to_mapping(config.Config()))
    for name in losses.names():
        for key, default in losses.hyperparameters(name).items():
            out.objective[key] = config_dict.placeholder(type(default))
    return out
