"""Verbs besides Lightning's: one module each, without a registry.

A module of this package is a verb when it defines a top-level function ``run``; ``lit-prune <module name>`` calls it
(``my_verb.py`` is ``lit-prune my-verb``). The first line of the module's docstring is the line in ``lit-prune --help``.
Both are read from the source, so the list of verbs costs no import::

    \"\"\"Answer a prompt about one or several images with fewer visual tokens.\"\"\"

    def run(image: list[Path], prompt: str, model: str = "micro", keep: int | None = None, compare: bool = False):
        \"\"\"First line of `lit-prune generate --help`.

        Args:
            image: PNG or JPEG files; several are one batch.
            prompt: The question, without chat template.
            ...

        Examples:
            lit-prune generate --image sample/0.png --prompt "What colour is the tile?"
        \"\"\"

* Options come from signature and docstring: a parameter without default is a required ``--option``. Lists may be
  written as ``--image a.png b.png``, by repeating the option, or as YAML; a ``bool`` as ``--compare`` or
  ``--compare false``. A parameter ``config`` also answers to ``-c`` (``config: list[str]`` takes several), one named
  ``out`` to ``-o``. A verb without such a parameter reads its options from ``-c FILE``; those given win. Words before
  the first option are the first parameters', in order: ``lit-prune replay FILE``.
* Lines under ``Examples:`` end the help: commands that can be pasted. A test parses all and runs the quick ones.
* User errors raise `lit_prune.errors.LitPruneError`: printed as one message, exit code 1, no traceback.
* Import heavy things inside the module as usual (a verb is imported only when called); print through
  `lit_prune.commands._support.console`.
* `lit_prune.commands.trainer.build(config, overrides)` gives model, data module and trainer of a `lightning fit`
  configuration without running it.
"""

LIGHTNING_VERBS = {
    "fit": "Train the plug-ins of a configuration; resume with --ckpt_path last.",
    "validate": "Measure on the validation set.",
    "test": "Measure on the test set: accuracy, tokens, FLOPs, shift.",
    "predict": "Write the answers to a data set.",
}
