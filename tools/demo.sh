#!/usr/bin/env bash
# The whole method on real pictures, on a machine without a GPU: handwritten digits, a small teacher, clusters, a balanced
# subset with its figures, four students, evaluation, export, and a table. About 7 minutes on 2 cores after the installation.
# Every stage is the real tool and can be run again: what is complete is kept.
#   bash tools/demo.sh             results in runs/demo, data in data/digits
#   STEPS=100 bash tools/demo.sh   shorter training (the accuracies fall)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
bin=${VIRTUAL_ENV:-$PWD/.venv}/bin
out=runs/demo
steps=${STEPS:-200}         # of each student
teacher_steps=${TEACHER_STEPS:-240}
ranks=2
mkdir -p $out
# Two ranks share the cores. Exported, because the launcher hands its environment to the ranks.
cores=$(nproc)
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} TOKENIZERS_PARALLELISM=false
touch $out/times.tsv

stage() { # stage NAME "what it does" "remedy" command...
    local name=$1 what=$2 remedy=$3 began=$SECONDS; shift 3
    printf '\n=== %s: %s\n' "$name" "$what"
    if ! "$@"; then
        printf 'demo: stage "%s" failed: %s\n  remedy: %s\n' "$name" "$*" "$remedy" >&2
        exit 1
    fi
    printf '=== %s: %d s\n' "$name" $((SECONDS - began))
    # The first time counts: a second run only finds what is complete.
    grep -q "^$name	" $out/times.tsv || printf '%s\t%d\n' "$name" $((SECONDS - began)) >>$out/times.tsv
}
alone() { OMP_NUM_THREADS=$cores "$bin/python" -W ignore "$@"; }
train() { # train NAME RUN.json options...
    local name=$1 file=$2; shift 2
    OMP_NUM_THREADS=$(((cores + ranks - 1) / ranks)) "$bin/deepspeed" --num_gpus $ranks --master_port "${MASTER_PORT:-29500}" megacid/train.py --deepspeed_config "$file" \
        --set run.dir=$out --set run.name="$name" "$@" \
        > >(grep -v --line-buffered -e '\[INFO\]' -e '\[WARNING\]') 2> >(grep -v --line-buffered -e '\[INFO\]' -e '\[WARNING\]' >&2)
}
train_student() { # train_student NAME RUN.json options...: the same steps and the same seed for each
    train "$@" --set run.total_steps="$steps" --set schedule.warmup_steps=$((steps / 5))
}
evaluate() { # evaluate NAME: export with open_clip's formats, then test what was exported
    alone tools/export.py --run "$out/$1" --out "$out/$1/export" --name "$1" &&
        alone tools/eval.py --model "local-dir:$out/$1/export" --dataset-root data/digits/test --dataset-name digits --tasks zero_shot,linear_probe --out "$out/$1/eval"
}
# Without the cluster term its settings have no effect, which is an error: null removes them from the run file.
no_cluster=(--set loss.cluster=0 --set loss.beta=null --set loss.gamma=null --set data.labels=null --set classifier=null)
again="read the message above, then run tools/demo.sh again: it goes on where it stopped"

stage data "1,797 digits as image-text pairs with redundant copies, and a held-out test split" "$again" \
    alone tools/synthesize.py digits --out data/digits
stage teacher "train a small CLIP teacher, contrastive loss only ($teacher_steps steps)" "$again; port in use: MASTER_PORT=29501 bash tools/demo.sh" \
    train teacher configs/digits_teacher.json --set run.total_steps="$teacher_steps" --set schedule.warmup_steps=$((teacher_steps / 5))
stage teacher_eval "export and evaluate the teacher" "$again" evaluate teacher
stage embed "teacher embeddings of every image and caption" "$again" \
    alone tools/embed.py --shards data/digits/train --out $out/teacher_embeddings --model "local-dir:$out/teacher/export"
stage cluster "k-means over the image embeddings" "$again" \
    alone tools/cluster.py --embeddings $out/teacher_embeddings --out $out/clusters --k 64
stage balance "semantic balance inside clusters and across their borders: keep 56.3 % of the pairs, as the paper does" "$again" \
    alone tools/balance.py --shards data/digits/train --embeddings $out/teacher_embeddings --clusters $out/clusters --out $out/balance --target-keep 0.563 --neighbor-clusters 4
stage figures "what was called redundant, one cluster step by step, cluster sizes: Figure 2 of the paper" "$again" \
    alone tools/figures.py --demo $out --out $out/figures
stage student_plain "student without a teacher (contrastive loss)" "$again" \
    train_student student_plain configs/digits_cpu.json "${no_cluster[@]}" --set loss.contrastive=1 --set loss.instance=0 --set data.teacher=null --set student.embed_dim=128
stage student_instance "student with instance distillation" "$again" \
    train_student student_instance configs/digits_cpu.json "${no_cluster[@]}"
stage student_cluster "student with instance + cluster distillation: the method" "$again" \
    train_student student_cluster configs/digits_cpu.json
stage student_balanced "the same on the balanced data" "$again" \
    train_student student_balanced configs/digits_cpu.json --set data.keep=$out/balance
for name in student_plain student_instance student_cluster student_balanced; do
    stage ${name}_eval "export and evaluate $name" "$again" evaluate $name
done
alone tools/summary.py --demo $out
echo "demo: whole run $SECONDS s; tensorboard: $bin/tensorboard --logdir $out; gallery: $out/balance/gallery.html; figures: $out/figures/index.html"
