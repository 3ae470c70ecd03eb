# From `strace -f` of tests: which system calls the threads of the program made once they were confined, one of
# "worker", "control-queue" or "control", and for calls of which some arguments only are let through, with which.
{ pid = $1; call = $0; sub(/^[0-9]+ +/, "", call); sub(/ <unfinished .*/, "", call) }
call ~ /^execve\("[^"]*\/(vhost-user-net|binary)"/ { role[pid] = "control"; confined[pid] = 0 }
call ~ /^prctl\(PR_SET_NAME, "pair-/ { role[pid] = "worker" }
call ~ /^prctl\(PR_SET_NAME, "control-queue"/ { role[pid] = "control-queue" }
call ~ /^\+\+\+ / { delete role[pid]; delete confined[pid] }
confined[pid] && pid in role && match(call, /^[a-z_0-9]+\(/) {
    name = substr(call, 1, RLENGTH - 1)
    split(substr(call, RLENGTH + 1), argument, /, |\)/)
    if (name == "setsockopt") name = name " " argument[3]
    else if (name ~ /^(ioctl|fcntl|io_uring_register)$/) name = name " " argument[2]
    seen[role[pid] " " name]++
}
call ~ /^(seccomp\(SECCOMP_SET_MODE_FILTER|prctl\(PR_SET_SECCOMP)/ { confined[pid] = 1 }
END { for (key in seen) print key, seen[key] }
