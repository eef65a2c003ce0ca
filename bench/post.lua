-- wrk's script: POST the file named after `--` with the headers that follow it as NAME VALUE.
function init(args)
  wrk.method = "POST"
  wrk.body = assert(io.open(args[1], "rb")):read("*a")
  for i = 2, #args, 2 do
    wrk.headers[args[i]] = args[i + 1]
  end
end

function done(summary)
  local e = summary.errors
  local errors = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format("requests=%d errors=%d\n", summary.requests, errors))
end
