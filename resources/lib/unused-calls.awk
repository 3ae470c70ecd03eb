# The permitted calls of docs/sandbox.md (the first file) that no thread made, by what seen-calls.awk printed: of tests
# on packet sockets (a file named packet), and of all others.
FNR == 1 { file++ }
file == 1 && /^### / {
    role = /packet/ ? "packet worker" : /queue pair/ ? "worker" : /control queue/ ? "control-queue" : "control"
}
file == 1 && role != "" && /^\| `/ {
    split($0, cell, / *\| */)
    gsub(/`/, "", cell[2])
    if (cell[3] == "" || cell[3] ~ /^no /) permitted[role " " cell[2]]
    else {
        count = split(cell[3], values, /, /)
        for (i = 1; i <= count; i++) permitted[role " " cell[2] " " values[i]]
    }
}
file > 1 {
    sub(/ [0-9]+$/, "")
    seen[(FILENAME ~ /packet$/ && /^worker/ ? "packet " : "") $0]
}
END { for (key in permitted) if (!(key in seen)) print key }
