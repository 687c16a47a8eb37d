// How the users of each JavaScript engine open a folder of shards; docs/make_interop.py runs them.
//
//     node readers.mjs READER FOLDER ... OUTPUT.json
//
// OUTPUT.json is that of readers.py.

import { execFileSync } from 'node:child_process'
import { readFileSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

const files = folder => readdirSync(folder).filter(name => name.endsWith('.parquet')).map(name => join(folder, name))

const readers = {
  hyparquet: async folder => {
    const { asyncBufferFromFile, parquetReadObjects } = await import('hyparquet')
    const { compressors } = await import('hyparquet-compressors')
    const read = async file => parquetReadObjects({ file: await asyncBufferFromFile(file), compressors })
    return (await Promise.all(files(folder).map(read))).flat()
  },

  hyparquet_bytes: async folder => {
    const { asyncBufferFromFile, parquetReadObjects } = await import('hyparquet')
    const { compressors } = await import('hyparquet-compressors')
    const read = async file => parquetReadObjects({ file: await asyncBufferFromFile(file), compressors, utf8: false })
    return (await Promise.all(files(folder).map(read))).flat()
  },

  parquet_wasm: async folder => {
    const { readParquet } = await import('parquet-wasm')
    const { tableFromIPC } = await import('apache-arrow')
    return files(folder).flatMap(file => tableFromIPC(readParquet(readFileSync(file)).intoIPCStream()).toArray())
  },

  parquetjs: async folder => {
    const { ParquetReader } = (await import('@dsnp/parquetjs')).default
    const rows = []
    for (const file of files(folder)) {
      const cursor = (await ParquetReader.openFile(file)).getCursor()
      for (let row = await cursor.next(); row; row = await cursor.next()) rows.push(row)
    }
    return rows
  },

  splat_transform: async folder => {
    const command = join(process.cwd(), 'node_modules/.bin/splat-transform')
    execFileSync(command, [join(folder, 'sample.ply'), join(folder, 'sample.csv')])
    const [names, ...rows] = readFileSync(join(folder, 'sample.csv'), 'utf8').trim().split('\n').map(line => line.split(','))
    return rows.map(row => Object.fromEntries(row.map((value, i) => [names[i], Number(value)])))
  },
}

function plain (value) {
  if (value === null || value === undefined) return null
  if (value instanceof Uint8Array) return { bytes: Buffer.from(value).toString('hex') }
  if (typeof value === 'bigint') return { int: String(value) }
  if (Array.isArray(value)) return value.map(plain)
  if (typeof value === 'object') {
    const object = typeof value.toJSON === 'function' ? value.toJSON() : value
    if (Array.isArray(object)) return object.map(plain)
    return Object.fromEntries(Object.entries(object).map(([name, each]) => [name, plain(each)]))
  }
  return value
}

const [reader, ...rest] = process.argv.slice(2)
const output = rest.pop()
const results = []
for (const folder of rest) {
  try {
    results.push((await readers[reader](folder)).map(plain))
  } catch (error) {
    results.push(`${error.name}: ${error.message}`)
  }
}
writeFileSync(output, JSON.stringify(results))
