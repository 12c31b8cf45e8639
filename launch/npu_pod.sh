#!/usr/bin/env bash
# Starts the processes of one node of a multi-node run: finds CANN and the network's addresses, then executes pcpvt,
# which starts a process per card and meets the other nodes.
#
#   launch/npu_pod.sh [--nnodes=N] [--node_rank=R] [--master_addr=HOST] [--master_port=PORT]
#                     [--nproc_per_node=K] [--retry_code=C] [--dry_run] [--] PCPVT_FLAGS...
#   launch/npu_pod.sh --nnodes=8 --node_rank=3 --master_addr=10.0.0.1 \
#                     --config=configs/pcpvt_s.py:npu64 --workdir=/shared/run
#
# Run it once per node, with a workdir that all nodes share. Missing options are taken from MASTER_ADDR and
# MASTER_PORT, then from OpenMPI, Intel MPI or MPICH, Slurm, a PyTorchJob (PET_*), an AscendJob, Volcano or an indexed
# Kubernetes job; without any of them the run has one node. The count in --config's ARG (npu64) is the total over all
# nodes. Variables that are already set are kept. --dry_run prints the commands that would run, as a shell script, and
# what is checked before the first step. CANN_SET_ENV is the path of CANN's set_env.sh, for when the search does not find
# it. :cudaN and :cpuN work as well; only :npuN needs CANN. The exit status is pcpvt's: 0 done, 2 an error of the user, 75
# stopped by a signal after saving (the same command resumes), 76 another node is lost, 77 a device computes wrongly,
# 128 + n killed by signal n, 1 another fault; 2 for wrong arguments and without CANN. With --retry_code=138 all but 0 and
# 2 become 138, for schedulers whose policy ExitCode starts a pod again after 128 to 255 only (AscendJob, PyTorchJob).
# More in docs/pods.md.
set -euo pipefail

die() { echo "${0##*/}: $*" >&2; exit 2; }
number() { # NAME VALUE LOW HIGH
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then die "$1: $2: give $3 to $4"; fi
}

# --- arguments ----------------------------------------------------------------------------------------------
nnodes='' node_rank='' master_addr='' master_port='' nproc_per_node='' retry_code='' dry_run='' flags=()
while (($#)); do
    case $1 in
        --nnodes | --node_rank | --master_addr | --master_port | --nproc_per_node | --retry_code)
            set -- "$1=${2-}" "${@:3}"
            continue ;;
        --nnodes=* | --node_rank=* | --master_addr=* | --master_port=* | --nproc_per_node=* | --retry_code=*)
            [[ -n ${1#*=} ]] || die "${1%=}: no value: give ${1}VALUE"
            option=${1%%=*}
            declare "${option#--}=${1#*=}" ;;
        --dry_run) dry_run=1 ;;
        -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --) flags+=("${@:2}"); break ;;
        --config | --workdir | --mode | --config[=.]* | --noconfig.* | --workdir=* | --mode=* | [!-]*) flags+=("$1") ;;
        *) die "$1: no such option: see --help; give pcpvt's own after --" ;;
    esac
    shift
done

device=npu total='' previous=''
for flag in "${flags[@]}"; do
    [[ $previous != --config ]] || flag=--config=$flag
    if [[ $flag =~ ^--config=.*:(npu|cuda|cpu)([0-9]*)(,|$) ]]; then
        device=${BASH_REMATCH[1]} total=${BASH_REMATCH[2]}
    elif [[ $flag =~ ^--config\.(device|processes)=(.*) ]]; then
        if [[ ${BASH_REMATCH[1]} == device ]]; then device=${BASH_REMATCH[2]}; else total=${BASH_REMATCH[2]}; fi
    fi
    previous=$flag
done

# --- which node this is -------------------------------------------------------------------------------------
from_scheduler() { # NAME NODES RANK TASKS_PER_NODE REMEDY: sets nnodes and node_rank unless the options did
    [[ $4 == 1 ]] || die "$1: $4 tasks on this node: pcpvt starts the processes: start one task per node ($5)"
    nnodes=${nnodes:-$2} node_rank=${node_rank:-$3}
}

master_addr=${master_addr:-${MASTER_ADDR:-}} master_port=${master_port:-${MASTER_PORT:-}}
# MPI before Slurm: if mpirun starts the tasks inside a Slurm allocation, Slurm's variables describe mpirun.
if [[ -n ${OMPI_COMM_WORLD_SIZE:-} ]]; then
    from_scheduler OpenMPI "$OMPI_COMM_WORLD_SIZE" "$OMPI_COMM_WORLD_RANK" \
        "${OMPI_COMM_WORLD_LOCAL_SIZE:-1}" 'mpirun --map-by ppr:1:node'
elif [[ -n ${PMI_SIZE:-} && (-n ${MPI_LOCALNRANKS:-} || -z ${SLURM_NODEID:-}) ]]; then # hydra, not srun --mpi=pmi2
    from_scheduler MPI "$PMI_SIZE" "$PMI_RANK" "${MPI_LOCALNRANKS:-1}" 'mpirun -ppn 1'
elif [[ -n ${SLURM_NODEID:-} ]]; then
    count=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
    from_scheduler Slurm "$count" "$SLURM_NODEID" $((${SLURM_STEP_NUM_TASKS:-$count} / count)) \
        'srun --ntasks-per-node=1'
elif [[ -n ${PET_NNODES:-} && -n ${PET_NODE_RANK:-} ]]; then
    from_scheduler PyTorchJob "${PET_NNODES#*:}" "$PET_NODE_RANK" 1 ''
    master_addr=${master_addr:-${PET_MASTER_ADDR:-}} master_port=${master_port:-${PET_MASTER_PORT:-}}
    [[ ! ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]] || nproc_per_node=${nproc_per_node:-$PET_NPROC_PER_NODE}
elif [[ -n ${LOCAL_WORLD_SIZE:-} && -n ${WORLD_SIZE:-} && -n ${RANK:-} ]]; then
    from_scheduler AscendJob $((WORLD_SIZE / LOCAL_WORLD_SIZE)) "$RANK" 1 ''
    nproc_per_node=${nproc_per_node:-$LOCAL_WORLD_SIZE}
elif [[ -n ${VC_TASK_INDEX:-} ]]; then
    tasks=()
    for name in "${!VC_@}"; do [[ $name != VC_*_HOSTS ]] || tasks+=("$name"); done
    if ((${#tasks[@]} == 1)); then # with more tasks the index does not identify the node: options are needed
        IFS=, read -ra hosts <<<"${!tasks[0]}"
        from_scheduler Volcano ${#hosts[@]} "$VC_TASK_INDEX" 1 ''
        master_addr=${master_addr:-${hosts[0]}}
    fi
    [[ -n $nnodes && -n $node_rank ]] ||
        die "Volcano: ${#tasks[@]} tasks with hosts, 1 expected: give --nnodes, --node_rank and --master_addr"
elif [[ -n ${JOB_COMPLETION_INDEX:-} ]]; then
    from_scheduler Kubernetes '' "$JOB_COMPLETION_INDEX" 1 ''
    [[ -n $nnodes ]] || die "--nnodes: not given: an indexed Kubernetes job does not tell its size"
fi
nodes=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}
if [[ -z $master_addr && -n ${SLURM_NODEID:-} && -n $nodes ]]; then # the first of rack[1-2]n[01-16,20],other
    master_addr=$(sed -E ':a; s/^([^[,]*)\[([0-9]+)[^]]*\]/\1\2/; ta; s/,.*//' <<<"$nodes")
elif [[ -z $master_addr && ${OMPI_MCA_orte_hnp_uri:-} =~ tcp://([0-9.]+) ]]; then # OpenMPI before 5
    master_addr=${BASH_REMATCH[1]}
    echo "${0##*/}: master: $master_addr, where mpirun runs: another with mpirun -x MASTER_ADDR=HOST" >&2
fi

nnodes=${nnodes:-1}
number --nnodes "$nnodes" 1 65536
if ((nnodes > 1)); then
    [[ -n $node_rank ]] || die "--node_rank: not given: say which of the $nnodes nodes this is, from 0"
    number --node_rank "$node_rank" 0 $((nnodes - 1))
    [[ -n $master_addr ]] || die "--master_addr: not given: name rank 0's node, or set MASTER_ADDR on all nodes"
fi
master_port=${master_port:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))} # different for jobs that share a node
number --master_port "$master_port" 1 65535
hccl_port=${HCCL_IF_BASE_PORT:-60000}
((master_port < hccl_port || master_port > hccl_port + 15)) ||
    die "--master_port: $master_port: HCCL uses $hccl_port to $((hccl_port + 15)): give another"

# --- how many processes -------------------------------------------------------------------------------------
cards=()
if [[ $device == npu ]]; then
    IFS=, read -ra cards <<<"${ASCEND_RT_VISIBLE_DEVICES:-}"
    for ((i = 1; i < ${#cards[@]}; i++)); do
        ((cards[i - 1] < cards[i])) ||
            die "ASCEND_RT_VISIBLE_DEVICES: $ASCEND_RT_VISIBLE_DEVICES: list the cards in ascending order"
    done
    if ((${#cards[@]} == 0)); then
        for card in /dev/davinci[0-9]*; do [[ ! -e $card ]] || cards+=("$card"); done
    fi
fi
[[ -z $total ]] || number "--config: $device" "$total" 1 1000000
if [[ -z $nproc_per_node && -n $total ]]; then
    ((total % nnodes == 0)) ||
        die "--config: $device$total: does not divide over $nnodes nodes: give a multiple of $nnodes"
    nproc_per_node=$((total / nnodes))
elif [[ -z $nproc_per_node && $device == cpu ]]; then
    nproc_per_node=1
elif [[ -z $nproc_per_node ]]; then
    ((${#cards[@]})) || die "--nproc_per_node: no NPU seen here: give it, or the total in --config=...:${device}N"
    nproc_per_node=${#cards[@]}
fi
number --nproc_per_node "$nproc_per_node" 1 1000000
[[ -z $retry_code ]] || number --retry_code "$retry_code" 128 255
((nnodes * nproc_per_node == ${total:-nnodes * nproc_per_node})) ||
    die "--config: $device$total: $nnodes nodes of $nproc_per_node are $((nnodes * nproc_per_node)): let both agree"
((${#cards[@]} == 0 || nproc_per_node <= ${#cards[@]})) ||
    die "--nproc_per_node: $nproc_per_node: this node shows ${#cards[@]} cards: give fewer, or more nodes"

# --- environment --------------------------------------------------------------------------------------------
exported=()
default() { export "$1=${!1-$2}"; exported+=("$1"); } # NAME VALUE: exports VALUE unless the variable is already set

route_to_master() { # prints this node's interface and address on the route to the master, or nothing if unknown
    local address
    address=$(getent ahostsv4 "$master_addr" | awk 'NR == 1 { print $1 }')
    # If /etc/hosts maps the host name to loopback, the route that other nodes use is unknown.
    [[ $address != 127.* || $master_addr == 127.* || $master_addr == localhost ]] || return 0
    ip -o -4 addr show to "$address" | awk -v address="$address" 'NR == 1 { print $2, address }' | grep . ||
        ip -o -4 route get "$address" | sed -nE 's/.* dev (\S+).* src (\S+).*/\1 \2/p'
}

settle() { export "$1=$2"; exported+=("$1"); } # NAME VALUE: exports VALUE; torchrun's options as variables (PET_*)
unset "${!PET_@}" RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_RANK
settle PET_NNODES "$nnodes"
settle PET_NPROC_PER_NODE "$nproc_per_node"
[[ -z $retry_code ]] || settle PCPVT_RETRY_CODE "$retry_code"
interface=lo address=''
if ((nnodes > 1)); then
    read -r interface address < <(route_to_master 2>/dev/null) || true
    settle PET_NODE_RANK "$node_rank"
    settle PET_RDZV_ENDPOINT "$master_addr:$master_port"
    settle PET_RDZV_ID "${SLURM_JOB_ID:-pcpvt}"
    [[ -z $address ]] || settle PET_LOCAL_ADDR "$address" # else other nodes must resolve this one's host name
fi
[[ -z $interface ]] || default GLOO_SOCKET_IFNAME "$interface"
case $device in
    npu)
        # The others are in pcpvt/devices/npu_settings.py.
        [[ -z $address || -n ${HCCL_SOCKET_IFNAME:-} ]] || default HCCL_IF_IP "$address" ;;
    cpu)
        threads=$(($(nproc) / nproc_per_node))
        default OMP_NUM_THREADS $((threads ? threads : 1)) ;;
esac

find_cann() { # prints the path of CANN's set_env.sh
    local info root file roots=()
    [[ -z ${CANN_SET_ENV:-} ]] || { echo "$CANN_SET_ENV"; return; }
    [[ -z ${ASCEND_HOME_PATH:-} ]] || roots+=("$ASCEND_HOME_PATH" "${ASCEND_HOME_PATH%/*}")
    for info in "${HOME:-}/Ascend/ascend_cann_install.info" /etc/Ascend/ascend_cann_install.info; do
        [[ ! -r $info ]] || mapfile -t -O ${#roots[@]} roots < <(sed -n 's/.*Install_*Path=//Ip' "$info")
    done
    for root in "${roots[@]}" "${HOME:-}/Ascend" /usr/local/Ascend; do
        for file in "$root"/{,ascend-toolkit/,cann/,nnae/}set_env.sh; do
            [[ ! -r $file ]] || { echo "$file"; return; }
        done
    done
}

set_env=''
if [[ $device == npu ]]; then
    set_env=$(find_cann)
    if [[ ! -r $set_env ]]; then
        echo "${0##*/}: CANN: ${set_env:-set_env.sh} not found: install its toolkit, or set CANN_SET_ENV=FILE" >&2
        [[ -n $dry_run ]] || exit 2
        set_env=''
    fi
fi

# --- run ----------------------------------------------------------------------------------------------------
command=(python -m pcpvt.main "${flags[@]}")
if [[ -n $dry_run ]]; then
    sed 's/^/# /' "$(dirname "${BASH_SOURCE[0]}")/checks.txt"
    [[ -z $set_env ]] || printf 'source %q\n' "$set_env"
    for name in "${exported[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done | LC_ALL=C sort
    printf 'exec'; printf ' %q' "${command[@]}"; echo
    exit 0
fi
if [[ -n $set_env ]]; then
    set +eu # the vendor's script reads unset variables
    set --
    # shellcheck disable=SC1090
    source "$set_env"
    set -eu
fi
exec "${command[@]}"
