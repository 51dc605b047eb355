#!/usr/bin/env bash
# MedHMP (stage 1), tiny, on synthetic intensive care stays: bash examples/recipes/medhmp.sh OUTPUT
set -euo pipefail
hf-ehr prepare synthetic_icu --output "$1/data" --options '{"patients": 300, "notes": false}'
hf-ehr fit-hourly --data "$1/data" --output "$1/features" --n_hours 24 --form continuous
hf-ehr pretrain medhmp --stage 1 --data "$1/data" --features "$1/features" --output_dir "$1/encoder" --preset tiny --model_options '{"hidden_size": 16, "demographics_hidden_size": 8, "intermediate_size": 32}' --num_train_epochs 2 --learning_rate 3e-3 --save_strategy no --report_to none
hf-ehr finetune medhmp --data "$1/data" --model "$1/encoder" --task icu_mortality_t24 --output_dir "$1/classifier" --num_train_epochs 2 --report_to none
hf-ehr evaluate --model "$1/classifier" --output "$1/evaluation"
hf-ehr publish "$1/classifier" --output "$1/medhmp-synthetic-tiny"
