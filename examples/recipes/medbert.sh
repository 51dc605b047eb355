#!/usr/bin/env bash
# Med-BERT, tiny, on synthetic patients: bash examples/recipes/medbert.sh OUTPUT
set -euo pipefail
hf-ehr prepare synthetic --output "$1/data" --options '{"world": "C", "patients": 900, "conditions": 18, "synonyms": 5, "noise_codes": 10}'
hf-ehr pretrain medbert --data "$1/data" --max_length 128 --output_dir "$1/pretrained" --preset tiny --model_options '{"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 128}' --max_tokens 2048 --num_train_epochs 3 --learning_rate 1e-2 --save_strategy no --report_to none
hf-ehr finetune medbert --data "$1/data" --max_length 128 --model "$1/pretrained" --task synthetic_outcome --output_dir "$1/classifier" --num_train_epochs 2 --learning_rate 3e-3 --report_to none
hf-ehr evaluate --model "$1/classifier" --output "$1/evaluation"
hf-ehr publish "$1/classifier" --output "$1/medbert-synthetic-tiny"
