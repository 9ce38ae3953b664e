"""The trial of a layout follows from class and configuration, and is a fifth of a tiny run's time: once each."""

from amopo_fast.models import check

_choose = check.choose_layout
_choices = {}


def chosen_once(model, requested="auto"):
    """`choose_layout`, which tries no layout of a configuration again; for forked processes too, if called before."""
    base = check.language_model_of(model)
    key = type(base), base.config.to_json_string(use_diff=False), requested
    if key not in _choices:
        _choices[key] = _choose(model, requested)
    return _choices[key]
