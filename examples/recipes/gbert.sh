#!/usr/bin/env bash
# G-BERT, tiny, on synthetic visits: bash examples/recipes/gbert.sh OUTPUT
set -euo pipefail
hf-ehr prepare synthetic_text_codes --output "$1/data" --options '{"patients": 400}'
hf-ehr pretrain gbert --data "$1/data" --output_dir "$1/pretrained" --preset tiny --model_options '{"hidden_size": 16, "intermediate_size": 16}' --num_train_epochs 15 --learning_rate 3e-3 --save_strategy no --report_to none
hf-ehr finetune gbert --data "$1/data" --model "$1/pretrained" --task medication_recommendation --output_dir "$1/recommender" --num_train_epochs 15 --learning_rate 3e-3 --report_to none
hf-ehr evaluate --model "$1/recommender" --output "$1/evaluation"
hf-ehr publish "$1/recommender" --output "$1/gbert-synthetic-tiny"
