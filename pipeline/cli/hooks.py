"""Refuse what Hydra would run before a verb can check its config: callbacks, launchers, logging, the environment."""

from collections.abc import Sequence

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from pipeline.cli.compose import known_keys
from pipeline.cli.errors import ConfigError
from pipeline.cli.targets import ADVICE

LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)
SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# Options of launchers that are commands or parts of one.
COMMANDS = ("setup", "python", "srun_args", "additional_parameters")
NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
# Keys of Hydra that run nothing: folders, names, texts, and what it records itself.
HARMLESS = (
    *("run.", "sweep.", "output_subdir", "verbose", "help.", "hydra_help.", "overrides.", "runtime."),
    *("job.name", "job.override_dirname", "job.id", "job.num", "job.config_name", "job.config."),
)
ALLOWED = "Hydra's basic sweeper, its basic launcher, those of submitit and joblib, and no logging"


def check_hooks(config: DictConfig) -> None:
    """Refuse hooks in a config that was composed with its node `hydra`, unless it has `trust=true`.

    Raises: ConfigError.
    """
    if config.get("trust"):
        return
    hydra = config.hydra
    defaults = known_keys(OmegaConf.structured(HydraConf))
    defaults |= {
        f"{name}.{key}": value for name in ("job_logging", "hydra_logging") for key, value in NO_LOGGING.items()
    }
    for key, value in known_keys(hydra).items():
        is_checked_below = key.startswith(("launcher.", "sweeper."))
        if not is_checked_below and not key.startswith(HARMLESS) and value not in (defaults.get(key), {}):
            _refuse(key, value)
    for name, targets in (("launcher", LAUNCHERS), ("sweeper", (SWEEPER,))):
        for is_resolved in (False, True):  # a text may resolve to a list, or to several lines
            _check_plugin(name, OmegaConf.to_container(hydra[name], resolve=is_resolved), targets=targets)


def _check_plugin(name: str, plain: object, *, targets: Sequence[str]) -> None:
    """Refuse another plugin, and options that are commands: submitit writes its options into a batch script."""
    options = plain if isinstance(plain, dict) else {"_target_": plain}
    if options.get("_target_") not in targets:
        _refuse(f"{name}._target_", options.get("_target_"))
    for option, value in options.items():
        is_line = isinstance(value, str) and value.isprintable() and option not in COMMANDS
        if value and not is_line and not isinstance(value, int | float):
            _refuse(f"{name}.{option}", value)


def _refuse(key: str, value: object) -> None:
    raise ConfigError(f"hydra.{key}={value} may run code, as only {ALLOWED} do not: {ADVICE}")
