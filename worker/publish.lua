-- Publish what the worker shows of itself, stamped with the server's time. Only the owner of the
-- epoch does: a worker that was fenced, and does not know it yet, changes nothing.
--
-- KEYS  meta, status
-- ARGV  epoch, body
-- Reply 1 published, 0 not the owner

if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return {0}
end
local now = redis.call('TIME')
redis.call('HSET', KEYS[2], 'at_ms', now[1] * 1000 + math.floor(now[2] / 1000), 'body', ARGV[2])
return {1}
