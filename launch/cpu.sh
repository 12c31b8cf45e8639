#!/usr/bin/env bash
# Trains on this host's CPU in one or several processes: binds cores and memory, sets the thread count, and preloads a
# fast allocator.
#
#   launch/cpu.sh [--nproc=N] [--dry_run] [--] PCPVT_FLAGS...
#   launch/cpu.sh --config=configs/pcpvt_s.py:cpu2 --workdir=runs/digits
#
# N processes (default: the count in --config's ARG, else 1) train together over gloo, each on an equal share of the
# physical cores that this shell may use; `taskset -c LIST launch/cpu.sh ...` restricts it to the cores of LIST.
# Variables that are already set are kept. --dry_run prints the commands that would run, as a shell script,
# and what several processes check before the first step.
# The exit status is the trainer's; 2 for wrong arguments.
#
# Of PyTorch's launchers, torchrun can bind processes only to cores near GPUs (--numa-binding) and turns every exit
# status into 1. torch.backends.xeon.run_cpu binds cores, but in torch 2.13 it exits with 0 when the trainer fails,
# leaves the trainer running when SIGTERM ends run_cpu itself, and confuses core numbers with CPU numbers.
set -euo pipefail

die() { echo "${0##*/}: $*" >&2; exit 2; }

# --- arguments --------------------------------------------------------------------------------------------------------
nproc='' dry_run='' shares=() flags=()
while (($#)); do
    case $1 in
        --nproc) set -- "--nproc=${2-}" "${@:3}"; continue ;;
        --nproc=*)
            nproc=${1#*=}
            [[ $nproc =~ ^[1-9][0-9]{0,3}$ ]] || die "--nproc: '$nproc': give a positive number" ;;
        --dry_run) dry_run=1 ;;
        -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --) flags+=("${@:2}"); break ;;
        --config | --workdir | --mode | --config[=.]* | --noconfig.* | --workdir=* | --mode=* | [!-]*) flags+=("$1") ;;
        *) die "$1: no such option: see --help; give pcpvt's own after --" ;;
    esac
    shift
done

previous=''
for flag in "${flags[@]}"; do
    [[ $previous != --config ]] || flag=--config=$flag
    if [[ $flag =~ ^--config=.*:(npu|cuda|cpu)([0-9]*)(,|$) ]]; then
        [[ ${BASH_REMATCH[1]} == cpu ]] || die "--config: ${BASH_REMATCH[1]}: this launcher is for cpu: give :cpuN"
        total=${BASH_REMATCH[2]}
        nproc=${nproc:-$total}
        [[ -z $total || $total == "$nproc" ]] || die "--nproc: $nproc: --config says cpu$total: let both agree"
    fi
    previous=$flag
done
nproc=${nproc:-1}

# --- cores ------------------------------------------------------------------------------------------------------------
hash lscpu taskset 2>/dev/null || die "lscpu, taskset: not found: install util-linux"
bind=(taskset --cpu-list)
# Memory is allocated on the node of the core that first touches it; numactl overrides an inherited policy.
if numactl --localalloc true 2>/dev/null; then bind=(numactl --localalloc --physcpubind); fi

# The first allowed CPU of every physical core, sorted so that neighbours are on one NUMA node.
allowed=$(awk '/^Cpus_allowed_list/ { print $2 }' /proc/self/status) # like 0-3,8
mapfile -t cpus < <(
    lscpu --parse=NODE,SOCKET,CORE,CPU | awk -F, -v allowed="$allowed" '
        BEGIN { n = split(allowed, part, ","); for (i = 1; i <= n; i++) { m = split(part[i], end, "-")
                for (cpu = end[1]; cpu <= end[m]; cpu++) may[cpu + 0] } }
        /^#/ || !($4 + 0 in may) || seen[$2, $3]++ { next }
        { print $1 + 0, $2, $3, $4 }' | sort -n -k1,1 -k2,2 -k3,3 | cut -d' ' -f4)
threads=$((${#cpus[@]} / nproc))
if ((threads == 0)); then
    echo "${0##*/}: --nproc: $nproc: more than the ${#cpus[@]} cores here: the processes share all of them" >&2
fi
for ((rank = 0; rank < nproc; rank++)); do
    share=("${cpus[@]:rank * threads:threads}")
    ((threads)) || share=("${cpus[@]}")
    shares+=("$(IFS=,; echo "${share[*]}")")
done

# --- environment ------------------------------------------------------------------------------------------------------
exported=()
default() { export "$1=${!1-$2}"; exported+=("$1"); } # NAME VALUE: exports VALUE unless the variable is already set

allocator() { # prints the path of the first allocator library that keeps freed memory
    local name prefix file
    for name in libtcmalloc_minimal libtcmalloc libjemalloc; do
        for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "${HOME:-}/.local" /usr/local /usr; do
            for file in "$prefix"/lib{,64,/*-linux-gnu}/"$name".so*; do
                [[ ! -e $file ]] || { echo "$file"; return; }
            done
        done
    done
}

default OMP_NUM_THREADS $((threads ? threads : 1))
((nproc == 1)) || default GLOO_SOCKET_IFNAME lo # one host: works without a resolvable host name and without a network
preload=${LD_PRELOAD:-}
if [[ $preload != *malloc* ]]; then
    preload=$(allocator)${preload:+:$preload}
    preload=${preload#:}
    [[ $preload == "${LD_PRELOAD:-}" ]] || { export LD_PRELOAD=$preload; exported+=(LD_PRELOAD); }
fi
case $preload in
    *jemalloc*) # keep freed memory: its default, to return it after 10 s, causes as many page faults as glibc
        default MALLOC_CONF oversize_threshold:1,background_thread:true,metadata_thp:auto,dirty_decay_ms:-1 ;;
    *tcmalloc*) ;;
    *) # glibc maps every tensor over 32 MB afresh, with a page fault per 4 kB: make it keep up to 4 GB instead
        default MALLOC_MMAP_MAX_ 0
        default MALLOC_TRIM_THRESHOLD_ 4294967296 ;;
esac

# --- run --------------------------------------------------------------------------------------------------------------
command=(python -m pcpvt.main "${flags[@]}")
if ((nproc == 1)); then
    command=("${bind[@]}" "${shares[0]}" "${command[@]}")
else # each process binds itself to its share
    export PCPVT_CORES="${shares[*]}" PET_NNODES=1 PET_NPROC_PER_NODE=$nproc
    exported+=(PCPVT_CORES PET_NNODES PET_NPROC_PER_NODE)
fi
if [[ -n $dry_run ]]; then
    ((nproc == 1)) || sed 's/^/# /' "$(dirname "${BASH_SOURCE[0]}")/checks.txt"
    for name in "${exported[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done | LC_ALL=C sort
    printf 'exec'; printf ' %q' "${command[@]}"; echo
    exit 0
fi
exec "${command[@]}"
