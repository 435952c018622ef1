-- Take ownership: the epoch grows by one, so that whoever held it before is fenced at its next
-- commit. A first start also sets the cursors, so that it can never happen twice.
--
-- KEYS  meta, symbols, decisions, comparisons
-- ARGV  owner, schema version, cursors of a first start, cursors after a gap ('' = refuse),
--       prefix of the state keys
-- Reply {'OK', epoch, 1 if the cursors were set now, gap or '', meta, symbols, owner before or ''}
--       {'GAP', reason} when state is missing and a gap is refused; nothing was written then.

local cursors = redis.call('HGET', KEYS[1], 'cursors')
local symbols = redis.call('SMEMBERS', KEYS[2])
local gap = ''

-- The state of the symbol '' is the run's own: others without it, while a warm-up was on its way or
-- before anything was put out, are of a warm-up that was cut short. It is done again.
local own = false
for _, symbol in ipairs(symbols) do
  own = own or symbol == ''
end
if #symbols > 0 and not own and (redis.call('HGET', KEYS[1], 'warming') == '1'
    or not cursors and redis.call('EXISTS', KEYS[3], KEYS[4]) == 0) then
  for _, symbol in ipairs(symbols) do
    redis.call('DEL', ARGV[5] .. symbol)
    redis.call('SREM', KEYS[2], symbol)
  end
  redis.call('HSET', KEYS[1], 'symbols', 0)
  symbols = {}
end

local gone = {}
if not cursors then
  if redis.call('EXISTS', KEYS[3], KEYS[4], KEYS[2]) > 0 then
    gap = 'the cursors are missing although our outputs or state exist'
  end
else
  for _, symbol in ipairs(symbols) do
    if redis.call('EXISTS', ARGV[5] .. symbol) == 0 then
      gone[#gone + 1] = symbol
    end
  end
  local missing = tonumber(redis.call('HGET', KEYS[1], 'symbols') or '0') - #symbols + #gone
  if missing > 0 then
    gap = 'the state of ' .. missing .. ' symbols is missing although the cursors exist'
  end
end
if gap ~= '' and ARGV[4] == '' then
  return {'GAP', gap}
end

local former = redis.call('HGET', KEYS[1], 'owner') or ''
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'schema', ARGV[2])
if gap ~= '' then
  -- what is gone starts cold; say so once, not at every start
  for _, symbol in ipairs(gone) do
    redis.call('SREM', KEYS[2], symbol)
  end
  redis.call('HSET', KEYS[1], 'symbols', redis.call('SCARD', KEYS[2]))
end
local first = 0
if not cursors then
  first = 1
  redis.call('HSET', KEYS[1], 'cursors', gap == '' and ARGV[3] or ARGV[4])
end
return {'OK', epoch, first, gap, redis.call('HGETALL', KEYS[1]), redis.call('SMEMBERS', KEYS[2]),
  former}
