# Shows the progress of `pip install --verbose` from its output: what is downloaded and compiled. All else goes into the
# file `log`; its end is shown if the last line says that pip failed.
{ print > log }
/^status [0-9]+$/ { status = $2; next }
{ recent[NR % 30] = $0 }
/^ *(Downloading|Installing collected packages)/ { print "quire: " tolower(substr($1, 1, 1)) substr($1, 2) " " $2 " " $3 " " $4; fflush() }
match($0, /\[[0-9]+\/[0-9]+\]/) {
    step = substr($0, RSTART, RLENGTH)
    what = "linking"
    if (match($0, /quire_kernels_[a-z0-9]+/)) what = "compiling the kernels for " substr($0, RSTART + 14, RLENGTH - 14)
    else if (match($0, /csrc\/[a-z_]+\.cpp/)) what = "compiling " substr($0, RSTART, RLENGTH)
    else if ($0 ~ /Building CXX/) what = "compiling the bindings"
    print "quire: " step " " what; fflush()
}
END {
    if (status != 0) {
        for (i = NR + 1; i <= NR + 30; i++) if (recent[i % 30] != "") print recent[i % 30] > "/dev/stderr"
        print "quire: pip failed; its whole output is in " log > "/dev/stderr"
    }
    exit status
}
