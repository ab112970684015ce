# Puts the servers of every backend at `/-kinds/PATH` into the backend at `/PATH` (serving/layout.py), and
# takes the way to `/-kinds` away. All servers of both get a weight, which each replica tells by itself at
# its port + `offset` (serving/weights.py). Reads the configuration twice: what there is, then what to write.

function path_of(backend) { return path[backend] == "/" ? "" : path[backend] }

NR == FNR {
  if ($1 == "acl" && $2 ~ /^is_/ && $3 == "path") path[substr($2, 4)] = $4
  if ($1 == "backend") backend = $2
  if ($1 == "server" && !/ backup *$/) servers[backend] = servers[backend] $0 "\n"
  next
}

FNR == 1 {
  for (other in path)
    if (path[other] ~ /^\/-kinds(\/|$)/) {
      wanted = substr(path[other], 8)
      for (one in path)
        if (path_of(one) == wanted && path[one] !~ /^\/-kinds/) { second[one] = other; first[other] = one }
    }
}

function weighed(line,    words, address) {
  split(line, words)
  split(words[3], address, ":")
  return line " weight 100 agent-check agent-inter 1s agent-port " (address[2] + offset)
}

$1 == "use_backend" && ($2 in first) { next }
$1 == "backend" { backend = $2 }
$1 == "server" && !/ backup *$/ && (backend in second) { print weighed($0); next }
{ print }
/# Servers in this backend/ && (backend in second) {
  count = split(servers[second[backend]], lines, "\n")
  for (i = 1; i < count; i++) print weighed(lines[i])
}
