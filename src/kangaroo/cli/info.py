"""`kangaroo info`: sizes and costs."""

import torch

from kangaroo.bench.cost import decoder_costs, describe, step_bytes
from kangaroo.cli.options import Drafter, Json, ModelOptions, with_model_options
from kangaroo.cli.terminal import print_json, show_table
from kangaroo.machine import human_bytes


@with_model_options
def info(options: ModelOptions, drafter: Drafter = "kangaroo", as_json: Json = False) -> None:
    """Sizes of target and adapter, and what drafting and verifying cost here as a share of a full step."""
    decoder = options.open(drafter)
    facts, costs = describe(decoder), decoder_costs(decoder)
    facts["full_step_seconds"] = costs.full_step
    facts["weights_read_per_second"] = human_bytes(step_bytes(decoder.target) / costs.full_step)
    facts["threads"] = torch.get_num_threads()
    if costs.shallow:  # the drafter runs the target's first layers
        facts["shallow_share"] = costs.shallow / costs.full_step
        facts["adapter_share"] = costs.adapter / costs.full_step
        facts["head_share"] = costs.head / costs.full_step
        facts["draft_step_share"] = costs.draft_share
    facts["verify_share"] = {count: seconds / costs.full_step for count, seconds in costs.verify.items()}
    if as_json:
        print_json(facts)
    else:
        show_table(facts)
