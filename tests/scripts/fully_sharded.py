"""Run by torchrun on two ranks: a Med-BERT sharded as ``examples/fsdp.yaml`` says, beside the same model whole.

Writes one JSON file a rank: losses of both over three steps, and the parameters that the rank holds.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_ehr import MedBertConfig, MedBertForMaskedLM


def losses(model, ids):
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main(configuration: Path, output: Path) -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    wrapped = yaml.safe_load(configuration.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2}
    config = MedBertConfig.tiny(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    whole = MedBertForMaskedLM(config)
    sharded = copy.deepcopy(whole)
    for module in list(sharded.modules()):
        if type(module).__name__ in wrapped:
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = torch.randint(6, 40, (4, 9))
    line = {
        "whole": losses(whole, ids),
        "sharded": losses(sharded, ids),
        "held": sum(parameter.to_local().numel() for parameter in sharded.parameters()),
        "all": whole.num_parameters(),
    }
    (output / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(line))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
