"""Plans that a rank has made are kept for the next test: proving one takes longer than a step of the small models here.

Imported by the pool's templates, before ranks are forked (`conftest.ranks`). A plan depends on the model's classes and their forwards, the
config, the names and shapes of the parameters, and the choices of the mesh: tests that change one of these get a plan of their own.
"""

import copy

import hf_tpsp.sharding as sharding

_plans = {}
_plan_for = sharding.plan_for


def plan_for(model, config):
    code = tuple((name, type(module), type(module).forward) for name, module in model.named_modules())
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters(remove_duplicate=False))
    key = type(model), model.config.to_json_string(use_diff=False), code, shapes, config
    if key not in _plans:
        _plans[key] = _plan_for(model, config)
    return copy.deepcopy(_plans[key])


sharding.plan_for = plan_for
